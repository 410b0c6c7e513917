"""What a run will need and how long it will take, from its configuration and a cluster's description."""
