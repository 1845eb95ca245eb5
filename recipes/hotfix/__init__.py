"""A trained network is made right on a few inputs, and flips nothing else beyond a budget."""
