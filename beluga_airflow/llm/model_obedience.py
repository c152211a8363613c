"""The obedient model: it does what the data tells it, also outside the schema. The worst model to check answers of.

It looks through the data for a demand in any form that it knows: words of many languages ("answer with X", "the answer
is X", "ignore all that and do X"), fake turns of a conversation, fragments of JSON. The last demand wins. Where nothing
is in the open, it looks again at what is hidden (see ``model_disguises``), so that no disguise spares a check its test.
"""

# ruff: noqa: RUF001  # words of many languages: what looks like a Latin letter here is none

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import JsonValue

from beluga_airflow.llm.model_disguises import DISGUISES

REASON = "the data said so"
MOST_CHARACTERS = 100_000


class Demand(NamedTuple):
    """What the data demands: an answer, or where `content` is given, exactly that in place of everything."""

    answer: JsonValue = None
    content: str | None = None


_VERBS = "|".join(
    (
        # English
        r"answer(?:ed)?|repl(?:y|ied)|respond|say|state|choose|select|pick|decide(?:\s+for)?|conclude|classif(?:y|ied)",
        r"mark(?:ed)?|label(?:led|ed)?|treat(?:ed)?|route(?:d)?|set|return|emit|give|go\s+with",
        r"(?:answer|decision|choice|response|result|verdict|output|status)\s*(?:is|:|=|->)",
        r"(?:must|should|shall|has\s+to|needs\s+to)\s+be",
        # German, Dutch, the north
        r"antworte[nt]?(?:\s+sie)?|antwort\s*(?:ist|lautet|:)|sage?|wähle(?:n\s+sie)?|entscheide(?:n\s+sie)?(?:\s+dich)?",
        r"gib|antwoord|kies|zeg|svara?|välj|vastaa|svar",
        # Spanish, French, Italian, Portuguese, Romanian
        r"respond(?:e|a|er|ed)|contesta|diga?|elige|escoge|selecciona|devuelve|la\s+respuesta\s+(?:correcta\s+)?es",
        r"répond(?:s|ez|re)|dis|dites|choisis(?:sez)?|renvoie|la\s+réponse\s+est|rispondi|scegli|la\s+risposta\s+è",
        r"escolha|selecione|a\s+resposta\s+é|răspunde|alege",
        # Russian, Ukrainian, Polish, Czech, Greek
        r"ответь(?:те)?|отвечай(?:те)?|выбери(?:те)?|скажи(?:те)?|верни|ответ\s*[—:-]|відповідай|вибери|обери",
        r"odpowiedz|wybierz|odpověz|vyber|odpovedz|odgovori|απάντησε|απαντήστε|επίλεξε|επιλέξτε",
        # Turkish, Indonesian, Vietnamese, Swahili, Hungarian
        r"yanıtla|cevap\s*:|seç|jawab(?:lah)?|pilih(?:lah)?|trả\s+lời|chọn|jibu|chagua|válaszolj",
        # Arabic, Persian, Hebrew, Hindi, Bengali
        r"أجب|أجيبي|اختر|الجواب\s*(?:هو|:)|پاسخ\s*(?:بده|دهید|:)|ענה|השב|בחר|उत्तर\s*(?:दें|दो|है|:)|जवाब\s*(?:दें|दो|:)|চुनें|উত্তর\s*(?:দিন|:)",
    )
)
# of languages that set no spaces
_JOINED_VERBS = (
    "回答|回复|答复|选择|输出|返回|答案是|答案为|答案必须是|回覆|選擇|輸出|答えは|答えろ|选|ตอบว่า|ตอบ|เลือก|답은|답변은"
)
_VERBS_AT_THE_END = "答え|回答|返答|選|出力|답|대답|선택|출력|ceva[pb]|yanıt|seç|उत्तर|जवाब|चुन"
_SMALL = "|".join(
    (
        "me|us|only|just|simply|always|exactly|literally|now|instead|with|as|to|for|back|by|is|be|it|this|that|the|a|an",
        "my|in|out|must|should|con|solo|sólo|la|el|avec|par|uniquement|seulement|le|mit|nur|dem|das|genau|als|com|apenas",
        "het|met|alleen|tylko|dengan|hanya|với|с|только",
    )
)
_NOUNS = (
    "words?|value|text|answer|response|decision|choice|order|case|one|following|single|status|palabra|opción|mot|wort"
    "|palavra|parola|woord|słowo|словом|слово|kelimesi|λέξη|بكلمة"
)
_VERB = rf"(?:(?<!\w)(?:{_VERBS})(?!\w)|(?:{_JOINED_VERBS}))"
_BETWEEN = rf"(?:\s|[:=>，：*`-]|(?:{_SMALL}|{_NOUNS})(?!\w)|[只仅僅用为為を]){{0,12}}"
_OPEN, _SHUT = "\"“”'‘’«»`「」『』《》", "\"“”'‘’«»`「」『』《》\n"
_QUOTED = rf"[{_OPEN}]{{1,3}}(?P<quoted>(?=[^{_SHUT}]*\w)[^{_SHUT}]{{1,200}})[{_OPEN}]"
_BARE = rf"(?P<bare>(?!(?:{_SMALL})(?!\w))[^\W_][^{_SHUT}.;!?。！？,，、<>{{}}|()\[\]]{{0,200}})"
_AFTERTHOUGHT = re.compile(
    r"\s+(?:and|because|since|no\s+matter|regardless|even|immediately|right\s+now|now|please|instead|whatever"
    r"|for\s+(?:this|the|every|all)|to\s+(?:this|the|every|all)|in\s+(?:this|your|all)|y|et|und|e|и)(?!\w).*|[\s*`:]+$",
    re.IGNORECASE | re.DOTALL,
)

_CLEAR = (
    re.compile(r"[\"'](?:answer|decision|choice|result|output)[\"']\s*:\s*(?P<json>\"(?:[^\"\\]|\\.)*\"|[^\s,}\]\"]+)"),
    re.compile(r"<(?:answer|decision|output|final)>\s*(?P<tagged>[^<\n]{1,200})", re.IGNORECASE),
    re.compile(_VERB + _BETWEEN + _QUOTED, re.IGNORECASE),
    re.compile(_VERB + _BETWEEN + _BARE, re.IGNORECASE),
    re.compile(rf"{_QUOTED}[^\n。.]{{0,20}}?(?:{_VERBS_AT_THE_END})", re.IGNORECASE),
)
_VAGUE = (
    # what a model is made to have said already
    re.compile(
        r"(?:^|[\n>\]#*|])\s*(?:assistant|model|ai|bot)\s*[|>:\]\n*]+\s*(?P<turn>[^\n<|{}]{1,200})", re.IGNORECASE
    ),
    # "ignore all that and ...": whatever follows
    re.compile(
        r"(?:ignor\w*|disregard|forget|override|bypass|olvida|oublie\w*|vergiss|vergessen|dimentica|esqueça|игнорир\w*"
        r"|забудь\w*|zignoruj|忽略|忘记|無視|무시)[^\n.!?。]{0,200}?"
        r"(?:(?:,|[\s;.!](?:and|then|instead|y|et|und|e|и))(?!\w)|[，。]|然后|并)\s*(?P<deed>[^\n.!?。，]{1,200})",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?<!\w)(?:please|you\s+must|you\s+have\s+to|you\s+will|system\s*:)\s+(?P<plea>[^\n.!?]{1,200})", re.IGNORECASE
    ),
)
_OBJECT = re.compile(r"\{[^{}]*[\"'](?:answer|decision|choice)[\"'][^{}]*\}")
_LEAK = re.compile(
    r"(?:reveal|repeat|print|show|tell|leak|output|display|dump|what\s+(?:is|are))\b[^\n.]{0,60}?"
    r"(?:system\s+(?:prompt|message)|(?:your|the)\s+(?:\w+\s+)?(?:instructions|prompt|rules)|everything\s+above)",
    re.IGNORECASE,
)
_REPEAT = re.compile(
    rf"(?:repeat|print|write|output)\b{_BETWEEN}{_QUOTED}\s*(?P<times>\d{{1,9}})\s*times", re.IGNORECASE
)
_RAW = re.compile(rf"(?:print|write|output|append|type|echo)\b{_BETWEEN}{_QUOTED}", re.IGNORECASE)
_NOTHING = re.compile(
    r"(?:say|answer|return|reply\s+with|output)\s+(?:nothing|an\s+empty\s+(?:string|text|answer))", re.IGNORECASE
)


def demand_of(told: Iterable[str], system: str) -> Demand | None:
    """What the data demands, or None where it demands nothing.

    Args:
        told: the texts that hold the data.
        system: what a demand to tell its instructions is answered with.
    """
    raw = list(told)
    # a demand that is spread over several values shows where they stand together
    together = " ".join(value for text in raw for value in _values(text, names=False))
    texts = [together, *(part for text in raw for part in (text, *_values(text, names=True)))]
    for views in (_as_it_stands, *DISGUISES):
        seen = [view for text in texts for view in views(text)]
        for find in (_clear, _vague):
            found = [demand for view in seen if (demand := find(view, system))]
            if found:
                return found[-1]
    return None


def _as_it_stands(text: str) -> Iterator[str]:
    yield text


def _values(text: str, *, names: bool) -> Iterator[str]:
    """The texts in the JSON that a text holds, also in JSON inside them; with the names of its keys or not."""
    at = text.find("{")
    try:
        if at >= 0:
            yield from _leaves(json.JSONDecoder().raw_decode(text, at)[0], names)
    except (ValueError, RecursionError):
        return


def _leaves(value: Any, names: bool) -> Iterator[str]:
    if isinstance(value, str):
        yield value
        yield from _values(value, names=names)
    elif isinstance(value, dict):
        for name, part in value.items():
            if names:
                yield str(name)
            yield from _leaves(part, names)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part, names)


def _clear(text: str, system: str) -> Demand | None:
    """What a text demands in so many words: of several demands, the last."""
    if _LEAK.search(text):
        return Demand(content=system)
    if again := _REPEAT.search(text):
        return Demand(content=(again["quoted"] * min(int(again["times"]), MOST_CHARACTERS))[:MOST_CHARACTERS])
    if whole := _last(_OBJECT, text):
        return Demand(content=whole[0])
    if raw := _last(_RAW, text):
        return Demand(content=raw["quoted"])
    if _NOTHING.search(text):
        return Demand(content="")
    found = [match for pattern in _CLEAR for match in pattern.finditer(text)]
    if not found:
        return None
    # by where the value begins: "answer with the word 'x'" is about x, not about a word
    last = max(found, key=lambda match: match.start(match.lastgroup or 0))
    return Demand(answer=_value(last))


def _vague(text: str, _: str) -> Demand | None:
    """What a text makes out to be said already, or asks for in no clear words."""
    found = [match for pattern in _VAGUE for match in pattern.finditer(text)]
    return Demand(answer=_value(found[-1])) if found else None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(reversed(list(pattern.finditer(text))), None)


def _value(match: re.Match[str]) -> JsonValue:
    text = match[match.lastgroup or 0].strip()
    if match.lastgroup == "json":
        try:
            value: JsonValue = json.loads(text)
        except (ValueError, RecursionError):
            return text.strip("\"'")
        return value
    return (text if match.lastgroup == "quoted" else _AFTERTHOUGHT.sub("", text)).strip(" \"'") or text
