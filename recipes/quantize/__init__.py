"""Put the weights of a network on a grid of few bits and keep its function: ``python -m recipes.quantize --help``."""
