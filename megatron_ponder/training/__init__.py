"""The loop and all that it stands on: objective, schedules, DeepSpeed, guards, saving, preemption."""
