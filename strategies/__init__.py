"""The ways to run a model that does not fit its GPU, behind one small protocol (see base.py)."""
