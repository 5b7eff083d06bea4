"""All that names Transformers, Accelerate or peft."""
