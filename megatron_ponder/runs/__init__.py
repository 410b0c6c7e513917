"""The folder of a run: metrics, log, starts, status, plots; without PyTorch."""
