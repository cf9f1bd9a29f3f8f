"""One file per benchmarked op; ``bench.registry`` lists them."""
