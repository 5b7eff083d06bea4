"""All that names Transformers, Accelerate or peft.

Of ``convert`` only ``parallelize.py`` and the package itself import it; import-linter holds that.
"""
