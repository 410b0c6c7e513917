"""The mesh of ranks, collectives, layers that know how they are sharded, the pipeline."""
