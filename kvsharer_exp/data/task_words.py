"""Common words that the made tasks draw their keys and sequences from.

`retrieval_tasks` makes keys of an adjective and a noun, and `collapse_tasks` makes sequences of
nouns. All words are short and common, so that a small tokenizer does not cut them into pieces.
"""

from __future__ import annotations

ADJECTIVES = tuple(
    """ancient blue bright brown clean cold cool dark deep dry early empty fast fine fresh gentle
    golden great green happy heavy hidden hot large light little lonely long loud lucky modern
    narrow new noble busy orange pink plain proud purple quick quiet rare red rich rough round royal
    sharp short silent silver simple slow small smooth soft strange strong sweet tall thick thin
    tiny warm white wide wild wise wooden yellow young""".split()
)
NOUNS = tuple(
    """anchor apple barrel basket bird blanket boat bottle bridge butter button camel candle carpet
    castle chair clock cloud corner cotton desert doctor dragon eagle engine farmer feather finger
    flower forest garden hammer harbor helmet horse island kettle ladder lake leather lemon lion
    market mirror monkey mountain needle painter paper pencil pepper pillow rabbit ribbon river
    rocket sailor salmon shoulder spider station stone table teacher temple tiger tower train
    trumpet turtle valley violin wagon wheel window winter""".split()
)
