"""Files, nothing about models: text to read, records and checkpoints to write, the machine they came from.

text        globs or data packages --> spans of text files
records     records.jsonl, valid after any interruption
checkpoints weights and optimizer state in safetensors
writing     files that appear whole or not at all
finite      whether tensors hold NaN or infinite values
machine     versions, processor, threads
"""
