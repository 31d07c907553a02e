"""A tokenizer.json as transformers' AutoTokenizer reads it: with what the small files beside it say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from converters.errors import InputError
from converters.tokenizer_json import SPACE, Added
from converters.tokenizer_settings import Settings, read_settings

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

TOKENIZER = "tokenizer.json"


def read_tokenizer(files: Mapping[str, bytes], where: str, rows: int) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of the files of a folder ``where``, by name; it neither cuts nor pads a prompt.

    Also the tokens that these files add beyond the ``rows`` of the embedding, which the tokenizer leaves out. Raises
    InputError for one that can't be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(files[TOKENIZER].decode())
        # Saved with a batch's settings at times. A prompt is never to be cut, nor to get tokens that mean nothing.
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception for what the library can't read; a panic is not even that
        raise InputError(f"{where}/{TOKENIZER} is no tokenizer that can be read ({error}). Fetch it again.") from None
    settings = read_settings(files, where)
    tokenizer.encode_special_tokens = settings.split_special
    return tokenizer, _add(tokenizer, settings, rows)


def _add(tokenizer: Tokenizer, settings: Settings, rows: int) -> list[str]:
    """Add what the small files name and tokenizer.json lacks; added_tokens_decoder goes before its settings too.

    Returns the texts without a row. BOS and EOS are put around texts by tokenizer.json alone: what the small files say
    of them is for making one.
    """
    own = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    marks = tokenizer.normalizer is not None and SPACE in tokenizer.normalizer.normalize_str(" ")
    by_id = []
    for _, entry in sorted(settings.added.items()):
        has = own.get(entry.content)
        # Where spaces are marked, tokens are found before that, whatever added_tokens_decoder says (tokenizer_json.py).
        same = has is not None and marks and _strips(has) == _strips(entry)
        if has is None or (settings.decoded and not same):
            by_id.append(entry)
    known = own.keys() | {entry.content for entry in by_id}
    special = [entry for entry in (*settings.named.values(), *settings.others) if entry.content not in known]
    kept, left_out = [], []
    room = rows - tokenizer.get_vocab_size()
    for entry in {entry.content: entry for entry in (*by_id, *special)}.values():
        if tokenizer.token_to_id(entry.content) is None:
            room -= 1
            if room < 0:
                left_out.append(entry.content)
                continue
        kept.append(entry.token())
    tokenizer.add_tokens(kept)
    return left_out


def _strips(token: Added | AddedToken) -> tuple[bool, bool, bool]:
    """A token's settings but for the text that it is found in."""
    return token.lstrip, token.rstrip, token.single_word
