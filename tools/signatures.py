"""Signatures on the site.

fastcore's leave out the star behind which arguments go by name alone, and run as wide as a default.
"""

import re
from inspect import Parameter

from fastcore.docments import DocmentText
from nbdev.showdoc import BasicMarkdownRenderer


class _Signature(DocmentText):
    @property
    def params(self):
        long_text = r"='(.{40}).{20,}'$"
        shown = [(re.sub(long_text, r"='\1...'", text), doc) for text, doc in super().params]
        kinds = [param.get('kind') for name, param in self.dm.items() if name != 'return']
        if Parameter.KEYWORD_ONLY in kinds and Parameter.VAR_POSITIONAL not in kinds:
            shown.insert(kinds.index(Parameter.KEYWORD_ONLY), ('*', ''))
        return shown


class Renderer(BasicMarkdownRenderer):
    "What nbdev shows of a function or class; settings.ini names it"

    def __init__(self, sym, name=None, title_level=3):
        super().__init__(sym, name=name, title_level=title_level)
        self.dm = _Signature(self.sym, maxline=96, docstring=False)
