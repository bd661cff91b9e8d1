"""What a run does, stage by stage: questions, sites, router, alignment, and the bytes that each sends."""
