"""Floor 2: the process mesh, collectives and layers that know how they are sharded."""
