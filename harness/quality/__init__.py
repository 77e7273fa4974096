"""What a lossy policy costs in quality: perplexity on real text, and how many greedy tokens are the lossless ones.

    sample.py      the text and its windows, the same for every run of a shape
    figures.py     perplexity and shares of tokens, from log-probabilities and token ids
    reference.py   what the model does losslessly: kept from an earlier run, or made in a process of its own
    phase.py       puts them together, after a run's timed passes
    words.py       how a lossy policy reads

Knows nothing of clocks, and nothing of how a run is recorded or shown.
"""
