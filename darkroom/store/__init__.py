"""Files of a model store, wherever it is: remote → this node's SSD. What is read into memory is in `models/store`.

The rule: nothing that a remote store says is trusted, and no file is seen by its name before it is whole and verified.
Without torch, so that the cache manager can read a store's catalogue.
"""
