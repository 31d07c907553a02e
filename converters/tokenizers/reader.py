"""Reading a tokenizer.json as transformers' AutoTokenizer does, with the settings in the small files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from converters.console.errors import BadTokenizer, shown
from converters.console.notes import note
from converters.tokenizers.settings import Settings, read_settings
from converters.tokenizers.tokenizer_json import SPACE, Added

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

TOKENIZER, MODEL = "tokenizer.json", "tokenizer.model"
LLAMA_KINDS = ("LlamaTokenizer", "LlamaTokenizerFast")


def read_tokenizer(files: Mapping[str, bytes], where: str, rows: int) -> tuple[Tokenizer, list[str]]:
    """The tokenizer from the auxiliary files of a folder ``where`` (name -> content); it doesn't truncate or pad.

    Also returns the added tokens without a row of the embedding, which has ``rows``: the tokenizer leaves them out.
    Tokens of the vocabulary itself can't be left out. Raises BadTokenizer for a tokenizer that can't be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(files[TOKENIZER].decode())
        beyond = [token.content for i, token in tokenizer.get_added_tokens_decoder().items() if i >= rows]
        if beyond:
            tokenizer = Tokenizer.from_str(_without(files[TOKENIZER], beyond))
        # Some are saved with settings for batches, but a prompt must be neither truncated nor padded.
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises Exception itself, and a panic is not even that
        raise BadTokenizer(f"{where}/{TOKENIZER} is not a readable tokenizer ({error}).") from None
    settings = read_settings(files, where)
    tokenizer.encode_special_tokens = settings.split_special
    made_here = MODEL in files and _may_be_made_here(tokenizer, settings)
    return tokenizer, beyond + _add(tokenizer, settings, rows, set(beyond), made_here)


def _may_be_made_here(tokenizer: Tokenizer, settings: Settings) -> bool:
    """Whether this tool may have made a tokenizer.json from the tokenizer.model beside it.

    Then it holds the added tokens' settings already, and these tokens are found before spaces are marked, whatever
    added_tokens_decoder says (tokenizer_json.py). For LLaMA's class this tool never adds the space by a normalizer, as
    older files of transformers do.
    """
    if tokenizer.normalizer is None or SPACE not in tokenizer.normalizer.normalize_str(" "):
        return False
    return not (settings.kind in LLAMA_KINDS and tokenizer.normalizer.normalize_str("a") == SPACE + "a")


def note_beyond(content: bytes, where: str, rows: int) -> None:
    """Note which tokens of a tokenizer.json have no row of the embedding. A damaged file is left to its reader."""
    try:
        fields = json.loads(content)
        vocabulary = fields["model"]["vocab"]  # a dictionary of ids, or pairs in the order of the ids
        ids = vocabulary if isinstance(vocabulary, dict) else {pair[0]: i for i, pair in enumerate(vocabulary)}
        added = [entry["content"] for entry in fields.get("added_tokens") or [] if entry["id"] >= rows]
        own = [token for token, i in ids.items() if i >= rows and token not in added]
    except (KeyError, TypeError, ValueError, RecursionError):
        return
    beyond = list(dict.fromkeys(own + added))
    if beyond:
        then = "llama-run refuses a prompt that needs one" if own else "in a prompt they are split like any text"
        more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
        note(
            f"{where}/{TOKENIZER} has tokens beyond the model's {rows} rows of embeddings: "
            f"{', '.join(shown(token) for token in beyond[:3])}{more}; {then}."
        )


def _without(content: bytes, texts: list[str]) -> str:
    """A tokenizer.json without the added tokens of these texts."""
    fields = json.loads(content)
    fields["added_tokens"] = [entry for entry in fields["added_tokens"] if entry["content"] not in texts]
    return json.dumps(fields)


def _add(tokenizer: Tokenizer, settings: Settings, rows: int, left_out_before: set[str], made_here: bool) -> list[str]:
    """Add the tokens that the small files name and tokenizer.json lacks.

    Settings in added_tokens_decoder override those of tokenizer.json, except ``normalized`` in one that was
    ``made_here``. Only tokenizer.json puts BOS and EOS around texts; the small files' settings for that are used when
    one is made. Returns the tokens without a row that weren't ``left_out_before``.
    """
    own = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    specials = {entry.content for entry in settings.special}
    by_id = []
    for _, entry in sorted(settings.added.items()):
        has = own.get(entry.content)
        same = has is not None and made_here and _strips(has) == _strips(entry)
        if entry.content not in left_out_before and (has is None or (settings.decoded and not same)):
            by_id.append(replace(entry, special=entry.special or entry.content in specials))
    known = left_out_before | own.keys() | {entry.content for entry in by_id}
    special = [entry for entry in settings.special if entry.content not in known]
    # A token that a role names is special, whatever tokenizer.json says.
    changed = {entry.content for entry in by_id}
    special += [_as_special(own[text]) for text in specials & own.keys() - changed if not own[text].special]
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


def _as_special(token: AddedToken) -> Added:
    return Added(token.content, True, token.lstrip, token.rstrip, token.single_word, token.normalized)


def _strips(token: Added | AddedToken) -> tuple[bool, bool, bool]:
    """A token's settings except ``normalized``."""
    return token.lstrip, token.rstrip, token.single_word
