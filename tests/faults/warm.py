"""Imported in the process that commands are forked from, so that none of them trains the toy tokenizer again."""

import os

from alignpipe.data.tokenizer import Tokenizer

# Threads of a process are not there in one that is forked from it.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
Tokenizer.toy()
