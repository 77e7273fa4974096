"""Fair comparison: strategies and settings measured cell by cell on the very same prompts."""
