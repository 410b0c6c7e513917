"""The transformer, the router and the passes; reads like the paper."""
