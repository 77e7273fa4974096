"""Model families as data: published configs, and one decoder for all of them."""
