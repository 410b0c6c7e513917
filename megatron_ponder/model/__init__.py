"""Floor 3: the transformer, the router and the passes; reads like the paper."""
