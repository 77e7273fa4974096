"""Results held side by side: of commits, of strategies, and over many commits."""
