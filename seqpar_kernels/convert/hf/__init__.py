"""What names Transformers, Accelerate or peft. Nothing else of ``convert`` but its entry point imports it."""
