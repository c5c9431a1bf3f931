"""The hot ops: one file an op, plain arrays in and out; `reference` is the readable specification of each."""
