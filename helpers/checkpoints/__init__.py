"""Where weights come from: the shipped stand-ins, random full-size weights, or a hub."""
