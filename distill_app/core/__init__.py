"""What every area shares: files, prompts, models, params, the frame of a stage. Small and still."""
