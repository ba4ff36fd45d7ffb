"""The bytes of each token, which join to a text where tokens hold parts of characters."""

from __future__ import annotations

import re

from tessera.data.tokenizer import Tokenizer
from tessera.data.vocabulary import byte_characters

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece's


class TokenBytes:
    """Of one tokenizer. special: ids that decoding leaves out, unless asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        named = map(tokenizer.token_id, tokenizer.special_tokens)
        self.special = {token for token in named if token is not None}
        rules = tokenizer.tokenizer
        self._added = {one.content for one in rules.get_added_tokens_decoder().values()}
        self._bytes: dict[str, int] = {}  # of a byte-level vocabulary's characters
        if "ByteLevel" in str(rules.decoder):
            self._bytes = {shown: byte for byte, shown in enumerate(byte_characters())}

    def of(self, token: int) -> bytes:
        """Those that the token adds to a text that holds it; a special token's are its name's."""
        text = self.tokenizer.token(token)
        if text is None:
            return b""
        if text in self._added:
            return text.encode()
        if self._bytes:
            known = all(character in self._bytes for character in text)
            return bytes(self._bytes[c] for c in text) if known else text.encode()
        if byte := _BYTE.fullmatch(text):
            return bytes([int(byte[1], 16)])
        return text.replace(_SPACE, " ").encode()

    def name(self, token: int) -> str:
        """The token's text; `bytes:\\xe6\\x97` where it is no whole character, as OpenAI has it."""
        found = self.of(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)
