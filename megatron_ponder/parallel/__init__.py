"""The process mesh, collectives and layers that know how they are sharded."""
