"""What tests share: models, oracles, Trainers, ranks."""
