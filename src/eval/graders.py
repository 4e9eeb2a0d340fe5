"""Find the final answer in a model's text and compare it with the gold answer. Pure functions of strings.

Not a command. `extract_letter("The answer is D. Option A ignores friction.", "ABCD") == "D"`: only statements count, a letter
that merely appears in prose is none. Mathematical answers are compared in math_answers, programs are run by code_sandbox.
GRADER_VERSION is recorded with every verdict: a change in any of them is visible in the logs, and old samples can be graded
again.
"""

from __future__ import annotations

import re
import textwrap
from functools import cache
from typing import NamedTuple
from unicodedata import normalize

GRADER_VERSION = "4"
THINK_END = "</think>"
THOUGHTS = (("<think>", THINK_END), ("<|channel>thought", "<channel|>"))  # Qwen, DeepSeek and most others; Gemma 4

SCALES = set(
    "hundred thousand million billion trillion dozen pi sqrt root sin cos tan cot sec csc log ln exp mod "
    "squared cubed factorial times plus minus over choose less more of half halves thirds".split()
)  # not units: 3 million is not 3, nor is 3 pi
_NUMBER = re.compile(r"[+-]?\s?\d+(?:,\d{3})*(?:\.0*)?")
_WHOLE_FRACTION = re.compile(
    r"([+-]?\s?\d{1,30})\s?/\s?(\d{1,30})|([+-]?)\\[dtc]?frac\s?{\s?(\d{1,30})\s?}\s?{\s?(\d{1,30})\s?}"
)
_NAMED = re.compile(r"\A[A-Za-z\\][A-Za-z\\\s+_]{0,40}=\s*")
_DEGREES = re.compile(r"\s*(?:\^\s*(?:\\circ|{\s*\\circ\s*})|°|\\degree)\Z")
_UNIT = re.compile(r"(?<=[\d})])\s{0,9}\\(?:text|mbox|mathrm|textrm)\s{0,9}{([^{}\d]{0,60})}(?:\s?\^\s?{?[23]}?)?\Z")
_THOUSANDS = re.compile(r"(?<=\d)(?:,?\\[,!;: ]|\{,\}) ?(?=\d{3}(?!\d))")
_LAYOUT = re.compile(r"\\(?:displaystyle|textstyle|left|right|[bB]igg?[lr]?)(?![A-Za-z])|\\[,!;: ]|~")
_WRAPPED = re.compile(  # what stays must be a number, so no bracket needs to be balanced
    r"(?s)(?:\\(?:text|textbf|textrm|mathbf|mathrm|mbox|boldsymbol|bm|boxed|fbox)\s?{|\\?{|\(|\[|\\\(|\\\[|\*\*)(.*?)(?:\\?}|\\?\)|\\?\]|\*\*)"
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s{0,9}(?:{|(?P<bare>[^\s{}$,;\\]{1,40}))|(?<!\\)[{}]")
_BETWEEN_BOXES = re.compile(r"[ $,;\\()\[\]]{0,20}\n?(?:and|or|\\text\s?{\s?,?\s?(?:and|or)\s?}|\\q?quad)?[ $,;\\()\[\]]{0,20}")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thought, as the templates of Qwen3.5 do; others leave it to the model."""
    return any(prompt.rstrip().endswith(opening) for opening, _ in THOUGHTS)


def split_thinking(text: str, opened: bool = True) -> tuple[str, str | None]:
    """(thinking, answer) of a completion; ``opened``: its prompt ended inside a thought. The answer is None when a thought
    was opened, by either, and never ended: a truncated answer is no answer. What a model says without a thought is its
    answer."""
    for opening, ending in THOUGHTS:
        thinking, end, answer = text.rpartition(ending)
        if end:
            return thinking, answer.strip()
        opened = opened or text.lstrip().startswith(opening)
    return (text, None) if opened else ("", text.strip())


def boxes(answer: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every box that is complete and not empty, in the order of their contents: \\boxed{...} and
    \\fbox{...} with braces balanced, and \\boxed 18. One pass, whatever the text."""
    opened: list[tuple[re.Match, bool]] = []  # (opening brace, whether a box opens there)
    found = []
    for brace in _BOX.finditer(answer):
        if brace["bare"]:
            bare = brace["bare"].rstrip(".")
            found.append((brace.start("bare"), brace.start(), brace.start("bare") + len(bare), bare))
        elif brace[0] != "}":
            opened.append((brace, len(brace[0]) > 1))
        elif opened:
            opening, box = opened.pop()
            if box:
                found.append((opening.end(), opening.start(), brace.end(), answer[opening.end() : brace.start()].strip()))
    return [box[1:] for box in sorted(found) if not re.fullmatch(r"[\s.…_?]*", box[3])]


def extract_boxed(answer: str) -> str | None:
    """The content of the last complete box that is not empty, or None."""
    found = boxes(answer)
    return found[-1][2] if found else None


def parse_integer(text: str) -> int | None:
    """The integer that the whole text is: sign, thousands in groups of three, a zero fraction, a whole fraction, a name before
    "=", a degree sign, a unit in \\text{}, brackets around it. "1,2" is none, nor is ".70"."""
    if len(text) > 200:
        return None
    cleaned = _LAYOUT.sub(" ", _THOUSANDS.sub("", text.replace("−", "-")))
    for _ in range(8):
        before = cleaned
        cleaned = cleaned.strip(" $\t\n")
        cleaned = _DEGREES.sub("", _NAMED.sub("", cleaned.removesuffix("."))).strip()
        if (unit := _UNIT.search(cleaned)) and not SCALES & set(unit[1].lower().split()):
            cleaned = cleaned[: unit.start()]
        if inner := _WRAPPED.fullmatch(cleaned):
            cleaned = inner[1]
        if cleaned == before:
            break
    if fraction := _WHOLE_FRACTION.fullmatch(cleaned):
        top, bottom = int((fraction[1] or fraction[3] + fraction[4]).replace(" ", "")), int(fraction[2] or fraction[5])
        return top // bottom if bottom and top % bottom == 0 else None
    if not _NUMBER.fullmatch(cleaned):
        return None
    return int(cleaned.replace(",", "").replace(" ", "").partition(".")[0])


def grade_integer(extracted: str | None, gold: int) -> bool:
    """Whether the extracted text is the integer ``gold``; -5 is not 5 and "1,2" is not 12."""
    return extracted is not None and parse_integer(extracted) == gold


# How a text states a mathematical answer without a box, in the order of trust: where it begins, and its source.
STATED = (
    (re.compile(r"(?m)^[ \t]{0,20}####[ \t]{0,20}(?=\S)"), "the solutions of GSM8K"),
    (
        re.compile(
            r"(?i)\banswer(?:\s{1,3}(?:to|for) (?:this|the) (?:problem|question))?(?:[\s*_]{0,9}(?:is|=|:|：)){1,3}"
            r"[\s*_:]{0,9}(?=\S)"
        ),
        "prompts of MATH and GSM8K without a box; simple-evals (Answer: ...)",
    ),
)
_DISPLAYED = re.compile(r"\$\$[^$]{1,800}\$\$|\\\[(?:[^\\]|\\(?!\])){1,800}\\\]")
_SENTENCE_END = re.compile(r"[.;!](?=[\s*_]|\Z)|,? (?:because|since|which|where|so that|as required)\b")


def extract_math(answer: str) -> str | None:
    """A mathematical answer: the last box, or the row of boxes that ends the text ("\\boxed{a} and \\boxed{b}", as it stands
    there), else what follows the last mark of STATED, to the end of its sentence or display. It stands in the text."""
    if found := boxes(answer):
        first = len(found) - 1
        while (
            first
            and found[first - 1][1] <= found[first][0]
            and _BETWEEN_BOXES.fullmatch(answer, found[first - 1][1], found[first][0])
        ):
            first -= 1
        same = len({content for _, _, content in found[first:]}) == 1
        return found[-1][2] if same else answer[found[first][0] : found[-1][1]]
    for mark, _ in STATED:
        if marks := list(mark.finditer(answer)):
            said = said_from(answer, marks[-1].end())
            said = said if said.startswith(("$$", "\\[")) else _SENTENCE_END.split(said, maxsplit=1)[0]
            return said.strip(" *_`").rstrip(".").strip() or None
    return None


def said_from(answer: str, start: int) -> str:
    """The display that begins at ``start``, else the rest of the line, without the marks of bold and code around it."""
    displayed = _DISPLAYED.match(answer, start)
    return displayed[0] if displayed else answer[start:].partition("\n")[0].strip(" *_`\t\r")


def fenced_blocks(answer: str) -> tuple[list[str], str | None]:
    """(contents of the closed code fences, what follows a last fence that is never closed). An indented fence's content is
    moved left."""
    blocks, end = [], 0
    for found in _FENCE.finditer(answer):
        blocks.append(textwrap.dedent(found[3]) if found[0][0] in " \t" else found[3])
        end = found.end()
    last = re.search(r"(?m)^[ \t]*(?:`{3,}|~{3,})[ \t]*[\w+-]*[^\n`]*\n", answer[end:])
    return blocks, answer[end + last.end() :] if last else None


def defines(code: str, entry_point: str) -> re.Match | None:
    name = re.escape(entry_point)
    return re.search(rf"(?m)^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+{name}\b|^{name}[ \t]*=", code)


def extract_code(answer: str, entry_point: str) -> str | None:
    """The last fenced block (closed or not) that defines ``entry_point``, else the last closed one, else a bare definition."""
    blocks, unclosed = fenced_blocks(answer)
    for body in [unclosed or "", *reversed(blocks)]:
        if defines(body, entry_point):
            return body
    if blocks:
        return blocks[-1]
    bare = defines(answer, entry_point)
    return answer[bare.start() :] if bare else None


def program_of(prompt: str, code: str, entry_point: str) -> str:
    """A whole program from a prompt that opens a function and the code that a model wrote: the prompt's imports and
    helpers stay in front of a full definition; a bare body is put below the prompt's own signature."""
    opened = [found.start() for found in re.finditer(rf"(?m)^(?:async\s+)?def\s+{re.escape(entry_point)}\b", prompt)]
    if defines(code, entry_point):
        return prompt[: opened[-1]] + "\n" + code if opened else code
    return prompt + textwrap.indent(textwrap.dedent(code), "    ")


# ---- option letters, in English or one of MMMLU's languages ----

# Letters that stand for A, B, C, D in option lists of other scripts: simple-evals (normalize_extracted_answer), and the
# alif without hamza and the Bengali consonants in their usual order, which it lacks. Full-width letters are folded.
OTHER_SCRIPTS = {
    "أ": "A", "ا": "A", "ب": "B", "ج": "C", "د": "D",
    "অ": "A", "ক": "A", "ব": "B", "খ": "B", "ড": "C", "গ": "C", "ঢ": "D", "ঘ": "D",
}  # fmt: skip


class Forms(NamedTuple):
    """How one language states the letter: regular expressions over folded text, a space where words may be parted.

    ``answer``: words for the answer. ``option``: words for an option. ``good``: what calls one right. ``is_``: a copula, or a
    verb of choice behind ``answer``. ``fill``: what else may stand between. ``right``: what follows a letter that is right.
    ``bare``: names of the answer that a letter may follow with no copula. ``choose``: what takes a letter as its object.
    """

    answer: str
    option: str
    good: str
    is_: str
    fill: str
    right: str
    bare: str = ""
    choose: str = ""
    spaced: bool = True  # words end at spaces
    source: str = "answer words of simple-evals (common.py), closing sentences of the language"


FORMS = {
    "en": Forms(
        answer="answer|solution|(?:correct|true|right) statement|correct(?= ?[:=])|(?:option|choice) that (?:best )?(?:fits|"
        "matches)",
        option="option|choice|letter|alternative|one",
        good="correct|right|best|true|most appropriate|most likely|most accurate|final|only|appropriate|accurate",
        is_="is|was|would be|should be|must be|will be|has to be|can only be|seems to be|appears to be|turns out to be|becomes",
        fill="the|that|number|statement|definitely|clearly|therefore|thus|hence|indeed|likely|most likely|probably|simply|"
        "then|"
        "obviously|certainly|so|actually|just|marked|labell?ed|given by|(?:to|for) (?:this|the) (?:question|problem)|here|"
        "of course|that (?:best )?(?:fits|matches)|among (?:the|these) (?:\\w+ )?(?:options|choices)",
        right="(?:is|was|must be|has to be|would be)(?: (?:therefore|thus|hence|indeed|clearly|definitely|in fact|only|then|"
        "obviously|actually))?(?: (?:the|my|our))?(?: (?:only|final|single|one))?(?: (?:correct|right|best|true|"
        "most appropriate|"
        "most accurate|most likely))?(?: (?:answer|option|choice|one|statement)|(?<=correct)|(?<=right)|(?<=best)|(?<=true))"
        "|as (?:the|my) (?:\\w+ )?answer",
        choose="choose|chose|pick|select|selecting|choosing|picking|go with|going with|opt for",
        source="prompts of simple-evals and MMLU-Pro",
    ),
    "zh": Forms(
        answer="答案|答复|答曰|答|解答|正解|正确的|正確的",
        option="选项|選項|选择|選擇|项|項",
        good="正确的?|正確的?|最佳|最合适的?|最合適的?|对的|對的|符合题意的?",
        is_="应该?是|應該?是|应该?为|應該?為|应选|應選|应当是|就是|是|为|為|选择|選擇|选|選",
        fill="选项|選項|项|項|应该|應該|最终|最終|为|是|的|显然|因此|所以|只能|此题|本题|本題",
        right="(?:选项|選項|项|項|这个选项|這個選項)?(?:是|为|為|就是)?(?:唯一|最)?(?:的)?(?:正确|正確)(?!地|性|率|与否|與否|"
        "吗|嗎)"
        "|(?:选项|選項|项|項)?(?:是|为|為)(?:对|對|答案)的?|(?:选项|選項|项|項)?符合题意",
        bare="答案|正解|(?:正确|正確)(?:答案|选项|選項)",
        choose="(?:故|因此|所以|应当|應當|应该|應該|本题|本題|此题|我|可|即|则|則|只能|综上|综上所述)?(?:应|應|可)?(?:选|"
        "選)(?:择|擇)?(?:的是|项是|项为|為|为|是)?",
        spaced=False,
        source="OpenCompass (first_option_postprocess), answer words of simple-evals",
    ),
    "ja": Forms(
        answer="(?<!誤)答え|回答|解答|(?<!不)正解|(?<!不)正答|正しいの|正しいもの|適切なの",
        option="選択肢|オプション|番号|もの|肢",
        good="正しい|正解の|最も適切な|適切な|最も正しい|適当な|最適な",
        is_="は|が|として(?:は|最も適切なのは)?|となるのは",
        fill="選択肢|オプション|記号|番号|の|最終的な|それゆえ|したがって|明らかに|おそらく|やはり",
        right="(?:が|は|こそ)(?:最も|唯一)?(?:の)?(?:正しい(?!か|かどうか)|正解(?!か)|正答|適切(?!か)|答え)",
        bare="(?<!不)正解|正答|答え|解答",
        spaced=False,
    ),
    "ko": Forms(
        answer="정답|(?<!오)답변|해답|(?<!오)답",
        option="선택지|보기|옵션|선택|것|번",
        good="올바른|옳은|정확한|맞는|가장 적절한|적절한|알맞은",
        is_="은|는|이|가|으로는|로는|란",
        fill="선택지|보기|옵션|바로|따라서|결국|분명히|번호|항목|번",
        right="(?:번)?(?:이|가|은|는)?[ ]?(?:바로 )?(?:정답|답|맞[는습다]|옳[은습다]|올바른|올바[르릅]|정확|가장 적절)",
        bare="정답|(?<!오)답",
        spaced=False,
    ),
    "de": Forms(
        answer="antwort|loesung|losung|antwortmoglichkeit|antwortoption|richtig|korrekt",
        option="option|moglichkeit|auswahl|alternative|aussage|buchstabe|wahl",
        good="richtige?|korrekte?|zutreffende?|beste|endgultige|finale",
        is_="ist|lautet|ware|waere|muss|bleibt|war|heisst",
        fill="die|der|das|antwort|also|daher|somit|demnach|folglich|damit|deshalb|eindeutig|hier|wahrscheinlich|nur|dann|"
        "auf die(?:se)? frage",
        right="(?:ist|ware|lautet|bleibt)?[ ]?(?:also |daher |somit |demnach |folglich |damit |hier |eindeutig |"
        "tatsachlich )?(?:die |der |das )?"
        "(?:einzig )?(?:richtige?|korrekte?|zutreffende?|beste)(?: (?:antwort|option|losung|wahl|moglichkeit|"
        "aussage)\\w*)?(?: ist)?"
        "|ist (?:also |daher |somit )?die (?:antwort|losung)",
        bare="(?:richtige|korrekte) (?:antwort|option|losung)",
        choose="wahle ich|ich wahle|wahlen wir|ist (?:also |daher |somit )?die (?:richtige |korrekte )?antwort",
    ),
    "fr": Forms(
        answer="reponse|solution",
        option="option|choix|lettre|proposition|alternative",
        good="bonne|bon|correcte?|exacte?|juste|vraie?|meilleure?|finale?|definitive",
        is_="est|serait|doit etre|reste|etait|sera",
        fill="la|le|reponse|donc|ainsi|bien|alors|evidemment|clairement|par consequent|a (?:cette|la) question|en effet",
        right="(?:est|etait|serait)(?: donc| bien| ainsi| alors)?(?: la| le| l')?[ ]?(?:seule? )?(?:bonne?|correcte?|juste|"
        "exacte?|vraie?|meilleure?)"
        "(?: (?:reponse|option|choix|proposition))?|(?:la|le) bonn?e? (?:reponse|option|choix)|est(?: donc)? la (?:reponse|"
        "solution)|(?:correcte?|exacte?)",
        choose="c'est(?: donc)?(?: la)?|il s'agit de(?: la| l')?|je choisis",
    ),
    "es": Forms(
        answer="respuesta|solucion|(?:la|lo) correct[ao]",
        option="opcion|alternativa|letra|inciso|eleccion|literal",
        good="correct[ao]|verdader[ao]|adecuad[ao]|acertad[ao]|final|mejor|definitiva",
        is_="es|seria|debe ser|sera|queda",
        fill="la|el|respuesta|por tanto|por lo tanto|entonces|claramente|asi|pues|a (?:esta|la) pregunta|en consecuencia",
        right="(?:es|seria|esta)(?: por (?:lo )?tanto| entonces)?(?: la| el)?(?: unica)?(?: (?:opcion|respuesta|alternativa))?"
        " (?:correct[ao]|verdader[ao]|adecuad[ao]|acertad[ao])|es la (?:respuesta|solucion)",
        choose="elijo|escojo|selecciono",
    ),
    "pt": Forms(
        answer="resposta|solucao|gabarito|(?:a|o) corret[ao]",
        option="opcao|alternativa|letra|item|escolha",
        good="corret[ao]|cert[ao]|verdadeir[ao]|adequad[ao]|final|melhor",
        is_="(?-i:e)|seria|deve ser|sera|fica",
        fill="(?-i:a|o)|resposta|portanto|entao|assim|claramente|logo|para (?:esta|a) (?:questao|pergunta)|letra",
        right="(?:e|esta|seria)(?: portanto| entao)?(?: a| o)?(?: unica)?(?: (?:opcao|resposta|alternativa))?"
        " (?:corret[ao]|cert[ao]|verdadeir[ao]|adequad[ao])|e a (?:resposta|solucao)",
        choose="escolho|marco|seleciono",
    ),
    "it": Forms(
        answer="risposta|soluzione|(?:la|quella) corretta",
        option="opzione|scelta|lettera|alternativa",
        good="corretta?o?|giust[ao]|esatt[ao]|migliore|finale|definitiva|vera",
        is_="(?-i:e)|sarebbe|deve essere|sara|risulta|rimane",
        fill="la|il|risposta|quindi|dunque|pertanto|perciò|allora|chiaramente|alla domanda|a questa domanda",
        right="(?:e|sarebbe|risulta)(?: quindi| dunque| pertanto)?(?: la| l'| quella)?[ ]?(?:unica )?(?:(?:risposta|opzione|"
        "scelta) )?"
        "(?:corrett[ao]|giust[ao]|esatt[ao]|vera)(?: (?:risposta|opzione))?|e la (?:risposta|soluzione)",
        choose="scelgo|seleziono",
    ),
    "id": Forms(
        answer="jawaban(?:nya)?",
        option="opsi|pilihan|huruf|alternatif",
        good="(?:yang )?(?:paling )?(?:benar|tepat|betul|sesuai)|akhir(?:nya)?|terbaik",
        is_="adalah|ialah|yaitu|yakni|merupakan|seharusnya",
        fill="opsi|pilihan|jawaban|huruf|itu|saya|kami|tersebut|jelas|jadi|maka|untuk (?:pertanyaan|soal) ini|"
        "dari (?:pertanyaan|soal) "
        "(?:ini|tersebut)",
        right="(?:adalah|merupakan|ialah|yang)?[ ]?(?:jawaban |pilihan |opsi )?(?:yang )?(?:paling )?(?:benar|tepat|betul)",
        bare="jawabannya|jawaban (?:yang )?(?:paling )?(?:benar|tepat)(?:nya)?",
        choose="pilih|memilih",
    ),
    "hi": Forms(
        answer="उत्तर|जवाब",
        option="विकल्प|चयन",
        good="सही|सर्वोत्तम|उचित|अंतिम|सबसे उपयुक्त",
        is_="है|होगा|होना चाहिए|हैं|यह है",
        fill="विकल्प|सही|है|इसलिए|अतः|स्पष्ट रूप से|तो|का|उत्तर|इस प्रश्न का",
        right="(?:ही )?(?:एकमात्र )?(?:सही|उचित|सबसे उपयुक्त)(?: (?:उत्तर|विकल्प|जवाब))?(?= ?(?:है|होगा|[।.]|\\Z|\n))",
        bare="उत्तर|जवाब|सही विकल्प",
    ),
    "bn": Forms(
        answer="উত্তর(?:টি|টা)?|জবাব",
        option="বিকল্প(?:টি)?|অপশন(?:টি)?",
        good="সঠিক|চূড়ান্ত|যথাযথ|সর্বোত্তম",
        is_="হল|হলো|হচ্ছে|হবে|ঃ",
        fill="বিকল্প|অপশন|সঠিক|হল|হলো|তাই|সুতরাং|অতএব|নম্বর",
        right="(?:ই |হল |হলো |হচ্ছে |নম্বর )?(?:সঠিক|যথাযথ)(?: (?:উত্তর|বিকল্প|অপশন)(?:টি)?)?",
        bare="উত্তর(?:টি|টা)?|সঠিক (?:বিকল্প|অপশন)(?:টি)?",
    ),
    "ar": Forms(
        answer="(?:ال)?[إا]جاب[ةه]|إجابتي|جوابي|(?:ال)?جواب|الحل",
        option="(?:ال)?خيار|(?:ال)?اختيار|الحرف",
        good="(?:ال)?صحيح[ةه]?|(?:ال)?نهائي[ةه]?|الأصح|الأنسب|الأفضل",
        is_="هي|هو|تكون|يكون|ستكون",
        fill="الخيار|الاختيار|الحرف|إذن|إذا|بالتالي|رقم|الحرف",
        right="(?:هو |هي |إذن )?(?:الخيار |الإجابة |الجواب |الاختيار )?(?:ال)?(?:صحيح[ةه]?|أصح)|(?:هي|هو) (?:الإجابة|الجواب)",
        bare="الإجابة الصحيحة|الجواب الصحيح|الإجابة النهائية",
        choose="اخترت|نختار|أختار",
    ),
    "sw": Forms(
        answer="jibu|majibu",
        option="chaguo|herufi|uchaguzi",
        good="sahihi|lililo sahihi|la mwisho|bora|lililo bora|kweli|la sahihi",
        is_="ni|litakuwa|lingekuwa",
        fill="chaguo|herufi|hilo|hivyo|kwa hiyo|kwa hivyo|namba|langu|letu|lake|la swali(?: hili)?|zaidi|kabisa",
        right="(?:ni|ndiyo|ndio|ndilo|ndicho)(?: (?:jibu|chaguo))?(?: (?:lililo|la))? sahihi|(?:ndiyo|ndio|ndilo|ni) jibu",
        choose="nachagua",
    ),
    "yo": Forms(
        answer="idahun|amona|adahun|anugo|asayan idahun",
        option="asayan|leta",
        good="(?:to|ti o|t'o) (?:to|tona|peye|pe|ye|ba a mu|dara julo)|ikeyin|gangan",
        is_="ni|je|yoo je",
        fill="naa|asayan|leta|ti|o|si|mi|nitori naa|(?:fun|si) ibeere (?:yii|naa)|yii",
        right="(?:ni|lo|je)(?: (?:idahun|asayan|o|ni))?(?: naa)?(?: (?:to|ti o|o))? (?:to|peye|pe)|ni idahun(?: naa)?",
        bare="idahun (?:to|ti o) (?:to|peye|pe)",
    ),
}  # fmt: skip

ACCENTS = (
    r"(?<=[a-z])[\u0300-\u036f]{1,4}|(?<=[A-Z])[\u0300-\u036f]{1,4}(?=[A-Za-z])"  # on the letters of words, not on É alone
)


def _unaccented(text: str) -> str:
    return normalize("NFKC", re.sub(ACCENTS, "", normalize("NFKD", text)))


def _compiled(pattern: str) -> re.Pattern:
    return re.compile("(?i)" + _unaccented(pattern))


# A letter must not be the start of a word, a name or a term: Berlin, B-cells, A.D., C++, A_4.
WORD_SIGNS = r"A-Za-z\u00c0-\u024f\u0300-\u036f\u1e00-\u1eff0-9_^\u0621-\u064a\u0985-\u09cd\u0904-\u094d"
LETTER_END = rf"(?![{WORD_SIGNS}+#]|['\u2019\u2010\u2011-][A-Za-z0-9]|\.[A-Z](?![a-z]))"
OPENING = r"[ \"'\u201c\u201d\u2018\u00ab\u00bb(\[<「『【〈《｢:\u2192]{0,8}"
CLOSING = r"[ .,;)\]>」』】〉》｣\"'\u201d\u2019\u00bb。।۔!]{0,12}"
AFTER = r"[ )\]>」』】〉》｣\"'\u201d\u2019\u00bb]{0,4}"
BRACKETED = (
    r"(?:(?<=[(\[<「『【〈《｢].)|(?![)\]>」』】〉》｣]))"  # a bracket that closes was opened: "A) wrong" begins an option
)
# "A good one" and "I think" are words, not options; a reason may follow an option
ARTICLE = re.compile(
    r"(?<=[AI]) (?!because|since|as |due |for |based |given |from |by |and |but |which |with |not |is |porque|pois|ja que|"
    r"que |ya que|"
    r"car |parce|puisque|weil|denn|da |und |perche|poiche|in quanto|karena|sebab|kwa|nitori|ist\b|est |es |sein)[a-z]"
)
# A second letter after the first is no answer; after a comma only where it is not the start of more prose ("A, B is wrong").
EITHER = (
    "or|and|und|oder|sowie|et|ou|o|e|y|u|dan|atau|na|au|ati|tabi|and/or|as well as|or else|和|或者|或|及|与|與|以及|还是|"
    "還是|と|または|もしくは|か|や|"
    "와|과|이나|나|또는|혹은|및|और|या|अथवा|এবং|বা|অথবা|ও|و|أو"
)
HEDGE = (
    rf"{AFTER}(?:{EITHER}|/|&|\+|\.{{1,3}} ?or){AFTER}(?:also |perhaps |maybe |possibly |option |choice |either )?"
    rf"[(\[\"']{{0,2}}{{one}}{LETTER_END}"
    rf"| {{one}}{LETTER_END}(?={AFTER}(?:\n|\Z))"
    rf"|{AFTER}[,،、(;]{AFTER}(?:{EITHER})?[ (\[\"']{{0,3}}{{one}}{LETTER_END}(?={AFTER}(?:[,،、.。।\n]|\Z|and\b|or\b))"
)
CONTRAST = (  # "not A but B"
    r"[ ,]{0,2}(?:(?:not|nicht|n'est pas|pas|no es|no|nao e|nao|non e|non|bukan|si|sio|ki i se|ليست|ليس|لا|不是|并非|"
    r"並非)[ ]?{one},?[ ]?"
    r"(?:but|sondern|mais|sino|mas|e sim|ma|bensi|melainkan|tetapi|bali|bi ko se|بل|而是|而应是)|(?:为|為)?{one}"
    r"(?:ではなく|でなく|じゃなく|(?:이|가) ?아니라|(?:이|가) ?아닌|नहीं,? ?बल्कि|नहीं,|(?:নয়|নয়),? ?বরং|(?:নয়|"
    r"নয়),)[、,]?)"
)
# What takes a statement back: in front of it ("the wrong answer is B", "suppose the answer is B") ...
DENIED_BEFORE = _compiled(
    r"(?:[不非未别別勿没]|不能|不可|不要|不会|不應|不应该|n't|\b(?:not|never|least|nicht|nao|bukan|tidak|wrong|incorrect|"
    r"false|bad|worst|tempting|falsche|falsch|inkorrekte|"
    r"unrichtige|mauvaise|fausse|incorrecte|errada|equivocada|salah)"
    r"|(?:错误|不正确|錯誤|不正確|間違った|誤った|正しくない|不適切な|잘못된|틀린|옳지 않은|गलत|ভুল)(?:的|の)?)\s?\Z"
    r"|(?:\b(?:if|suppose|supposing|assume|assuming|imagine|whether|unless|wrong to (?:say|think|conclude)|doubt|doubtful|"
    r"unlikely|nothing (?:suggests|shows|implies)|deny|false|"
    r"nobody|no one|thought|believed|guessed|"
    r"not (?:true|the case|correct|say|think|mean|claim|believe|agree|certain|sure|clear)|\w{2,6}n't (?:true|say|think|mean|"
    r"claim|believe|agree)|"
    r"(?:might|may|could|would|people|students?|some|others|many|one|he|she|they) (?:\w+ )?(?:think|say|claim|believe|guess|"
    r"argue|answer)s?|"
    r"wenn|falls|angenommen|konnte (?:meinen|denken|glauben)|pourrait (?:croire|penser)|podria (?:pensarse|creerse|pensar)|"
    r"potrebbe pensare|poderia pensar|(?:قد )?يظن(?: البعض)?|nicht,? dass|ob|si|supposons que|supongamos que|se|suponha que|"
    r"supponiamo che|jika|kalau|"
    r"andaikan|यदि|अगर|যদি|"
    r"إذا كانت|لو كانت|إذا كان|لو كان|ikiwa|kama|bi|क्या|কি|هل)(?!\w)|如果|假如|若|假设|假設|有人|有些人|很多人|并非|並非|"
    r"不能说|不是说|不认为|不認為|もし|仮に|만약|만일)"
    r"(?:[ ,]{0,2}(?:that|the|a|my|your|this|says?|correct|right|final|best|really|so|dass|die|der|richtige|la|le|el|il|"
    r"bonne|reponse|que|"
    r"a|o|أن|sahihi|सही|সঠিক|正确|正確|认为|認為|说|これ|그)){0,6}[ ,]{0,2}\Z"
)
# ... or behind its letter ("B is wrong", "Bではない", "B नहीं है", "B?")
DENIED_AFTER = _compiled(
    rf"{AFTER}(?:,? ?(?:no,|wait\b)|(?:है|हैं|হয়|ist|ni|right|correct)? ?[?\u061f]"
    r"|(?:입니까|일까|인가|ですか|でしょうか|だろうか|なのか|吗|嗎|呢|的(?!选项|答案|$|[。.,]))"
    r"|(?:is|was|are|seems|looks|would be|ist|ware|war|est|etait|es|e|era|adalah|ni) ?(?:not|n't|clearly wrong|wrong|"
    r"incorrect|false|nicht|"
    r"inkorrekt|falsch|pas|faux|fausse|incorrecte?|incorrecta|falsa|errad[ao]|errat[ao]|sbagliat[ao]|salah|si sahihi|"
    r"impossible|ruled)\b"
    r"|(?:it|this|that) (?:is|was) (?:wrong|incorrect|false|not)\b"
    r"|isn['\u2019]?t\b|n['\u2019]est pas|no es\b|non e\b|nao e\b|tidak (?:benar|tepat)|bukan\b|salah\b|si sahihi|sio\b|"
    r"ko to\b|ki i"
    r"|(?:选项|選項|项|項)?(?:是|就是|的说法是|的說法是)?(?:错|錯|不对|不對|不正|不成|不符|不合|有误|有誤)"
    r"|(?:番|を|は|が)?(?:間違|誤り|除外|不正解|不適)"
    r"|(?:번)?(?:은|는|이|가)? ?(?:틀|잘못|오답)"
    r"|(?:गलत|ভুল|خاطئ|خطأ|غير|ليس|ليست)"
    r"|[^A-Za-z.。।!?\n,、،;]{0,14}?(?:아니|라고 |라면|다면|일 수 없|なさそう|言えま|いえま|言えな|限らな|だと思われ|"
    r"とすると|なら(?!ば)|아닙|아닌|아님|않|(?<!しか)(?<!違い)ない(?!か)|ではなく|じゃなく|でなく|"
    r"(?<!しか)(?<!違い)ありません|नहीं|নয়|নহে|নেই| না(?![\u0980-\u09ff])))"
)
NAMED = _compiled(  # a statement about B, not option B; and a letter that is part of a name
    r"(?:\A|[.,:;!?。、।!(\[\"'\n\u2014-]|\b(?:so|thus|hence|therefore|then|that|and|but|means|think|believe|conclude|see|"
    r"because|since|"
    r"only|is|clearly|und|also|daher|somit|damit|ist|dass|donc|que|est|ainsi|portanto|por tanto|entonces|es|logo|entao|quindi|"
    r"che|dunque|jadi|maka|bahwa|karena itu|इसलिए|अतः|তাই|সুতরাং|অতএব|إذن|لذلك|hivyo|hiyo|kwamba|naa|pe|所以|因此|故|则|"
    r"よって|したがって|"
    r"따라서|그러므로|はず|का))[ \"'(\[\u201c「『【]{0,4}\Z"
)
# "If ..., the answer would be A", "the answer is A if ...": not what the text answers, unless it says nothing else.
CONDITION = _compiled(rf"{AFTER}(?:,? ?only )?,? ?\b(?:if|unless|falls|wenn|jika|kecuali)\b")
DENIED_OPTION = _compiled(  # "it cannot be option B."
    r"(?:\b(?:not|nor|never|cannot|eliminat\w*|exclud\w*|rul\w* out|unlike|than|consider\w*|look\w* at|examin\w*|check\w*|"
    r"first|evaluat\w*|analy[sz]\w*|see|compar\w*|discuss\w*|versus|vs\.?|contradict\w*|against|reject\w*|discard\w*|"
    r"confus\w*|instead of|neither|nicht|kein\w*|ausser|pas|non|no|nao|bukan|tidak|si)|n't)(?: \w+){0,3}[ ,(]{0,2}\Z"
)
MARKUP = (  # what is taken off a text before its letters are looked for
    (re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s{0,9}{?"), "\u27e6"),
    (re.compile(r"<answer>"), "\nAnswer: "),
    (re.compile(r"</?(?:answer|b|i|u|em|strong|span|p|br|final|final_answer|code|center)\s?/?>"), " "),
    (re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal|color)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|mbox|hbox|underline|"
    r"operatorname)\s{0,9}{"), ""),
    (re.compile(r"\\(?:bf|rm|it|sf|displaystyle|left|right|quad|qquad|large|Large|huge|Huge|bigg?|Bigg?)(?![A-Za-z])|"
    r"\\[()\[\],;:! ]"), " "),
    (re.compile(r"[*`$\\]|(?<![A-Za-z0-9])_{1,4}|_{1,4}(?![A-Za-z0-9{])"), ""),
    (re.compile(r"[{}\t\r\u00a0\u200b-\u200f\u202a-\u202e\ufeff]"), " "),
    (re.compile(r"(?m)^[ #>]{1,20}"), ""),
    (re.compile(r" {2,}"), " "),
    (re.compile(r"\n[ \n]{2,}"), "\n\n"),
)  # fmt: skip


THEREFORE = (
    "so|therefore|thus|hence|in conclusion|somit|daher|donc|ainsi|por lo tanto|por tanto|portanto|logo|quindi|pertanto|"
    "jadi|maka|oleh karena itu|kwa hiyo|kwa hivyo|nitori naa|इसलिए|अतः|তাই|সুতরাং|অতএব|إذن|لذلك|وبالتالي|因此|所以|故|综上|"
    "综上所述|따라서|그러므로|"
    "よって|したがって|ゆえに|以上より"
)
LEAD = THEREFORE + "|my|our|and|also|最終的な|最终|最終|최종|本题|本題"
ENDED = (  # where a letter with no copula is the whole statement
    rf"(?:(?<!\(.)(?=\) )|(?={AFTER}(?:[.。।۔!,،、;]|\n|\Z"
    r"|(?:है|हैं|होगा|होगी|হবে|হয়|ist(?= ?[.,;\n]|\Z)|입니다|이다|임|です|である|だ|でしょう|と)"
    r"|as (?:the|my)|because|since|porque|pois|perche|weil|car|karena|sebab|kwa sababu|क्योंकि|কারণ|لأن)))"
)
# options listed below the word: "Answer:\nA. ...\nB. ..."
LISTED = re.compile(r"[.):][^\n]{0,300}\n{1,2}[ (\[]{0,3}[B-Z][.):]")
OF_WHAT = _compiled(
    r" ?(?:about|regarding|that|insofar|in saying|to say|when|if|only (?:if|when|for)|for (?:a|the) different)\b"
)
WOULD = _compiled(r"\bwould\b")
HEDGED = _compiled(  # "A or option B is correct"
    r"\b(?-i:[A-J])[ )\]\"]{0,3}(?:or|and|oder|und|et|ou|o|y|e|dan|atau|na|au|ati|tabi|nor|/|&|,|和|或|と|または|와|과|또는|"
    r"और|या|এবং|বা|و|أو) ?"
    r"(?:the |la |die |l')?\Z"
)


def folded(text: str) -> str:
    """The text with one form for each sign: full-width and bold letters plain, no accents on the letters of words (a single
    É or À stays what it is), no Markdown, LaTeX or HTML; "⟦" opens a box."""
    for pattern, to in MARKUP:
        text = pattern.sub(to, text)
    return text if text.isascii() else _unaccented(text).replace("\u2019", "'")


def latin(letter: str) -> str:
    """The letter A, B, ... that a letter of another script or lower case stands for."""
    return OTHER_SCRIPTS.get(letter, letter.upper())


SCRIPTS = {"zh": "\u4e00-\u9fff", "ja": "\u3040-\u30ff\u4e00-\u9fff", "ko": "\uac00-\ud7a3", "hi": "\u0900-\u097f",
           "bn": "\u0980-\u09ff", "ar": "\u0600-\u06ff"}  # fmt: skip


@cache
def _sign(language: str) -> re.Pattern:
    """What a text holds that states anything in a language: saves looking for the rest."""
    form = FORMS[language]
    return (
        re.compile(f"[{SCRIPTS[language]}]")
        if language in SCRIPTS
        else _compiled("|".join(filter(None, (form.answer, form.option, form.good, form.choose))))
    )


@cache
def _patterns(letters: str) -> dict[str, list[tuple[str, re.Pattern]]]:
    """(kind, pattern) by language, "" for all, in the order of trust within a language; the letter is group x, the name of
    the answer or option group n."""
    other = "".join(sign for sign, letter in OTHER_SCRIPTS.items() if letter in letters)
    upper = f"[{letters}{other}]"
    hedge = HEDGE.replace("{one}", f"(?-i:{upper})")
    one, any_case = (
        rf"{OPENING}(?P<x>(?-i:[{signs}{other}])){LETTER_END}(?!{hedge})" for signs in (letters, letters + letters.lower())
    )
    contrast = CONTRAST.replace("{one}", rf"{OPENING}(?-i:{upper}){AFTER}")
    every_name, every_fill = [], []
    found: dict[str, list[tuple[str, str]]] = {}
    for language, form in FORMS.items():
        latin_script = form.answer[0].isascii() and form.spaced and language != "ar"
        start = "(?<![A-Za-z-])" if latin_script else r"(?<!\w)[وفل]?" if form.spaced else ""
        word = r"(?!\w)" if form.spaced else ""
        fill = rf"[ ,、(\"]{{0,3}}(?:l')?(?:{form.fill}|{form.good}|{form.option}){word}"
        link = rf"[ ,、]{{0,2}}(?:(?:{form.is_}){word}|[:=→–—】\]-]|\n{{1,2}})"
        links = rf"(?:{fill}){{0,5}}(?:{contrast}|{link})(?:{contrast}|{link}|{fill}){{0,6}}[,、]?"
        good = rf"(?:(?:{form.good})[ ]?){{1,2}}(?:{form.option})|(?:{form.option})[ ](?:(?:{form.fill})[ ])?(?:{form.good})"
        answer, option = rf"{start}(?P<n>(?:{form.answer})){word}", rf"{start}(?P<n>{form.option}|{form.answer}){word}"
        every_name += [form.answer, form.option]
        every_fill += [form.fill, form.is_, form.good]
        entries = [
            ("line", rf"(?m)^[ •+\d.)【\[-]{{0,8}}(?:(?:{LEAD}|{form.fill}|{form.good})[ ,:]{{0,2}}){{0,5}}"
                     rf"(?P<n>{form.answer}|{good}){word}(?:{fill}|{link}){{0,6}}[ ]?[:=→–—】\]-]{any_case}{CLOSING}$"),
            ("answer", rf"{answer}{links}{one}"),
            ("good option", rf"{start}(?P<n>{good}){word}{links}{one}"),
            ("right option", rf"{option}{one}{AFTER}(?:{form.right}){word}"),
            ("right", rf"(?<![{WORD_SIGNS}])(?P<n>)(?P<x>(?-i:{upper})){LETTER_END}(?!{hedge}){BRACKETED}{AFTER}"
                      rf"(?:{form.right}){word}"),
        ]  # fmt: skip
        if form.bare:
            entries.append(("answer", rf"{start}(?P<n>{form.bare}){word}(?:{fill}){{0,4}}{one}{ENDED}"))
        if form.choose:
            kind = "right option" if form.spaced else "answer"
            rest = rf"(?:{fill}){{0,3}}{one}{ENDED}" if form.spaced else one
            entries.append((kind, rf"{start}(?P<n>{form.choose}){word}{rest}"))
        if latin_script:
            entries.append(("last option" if language == "en" else "lone option", rf"{option}{one}{CLOSING}\Z"))
        found[language] = entries
    names, fills, options = "|".join(every_name), "|".join(every_fill), "|".join(form.option for form in FORMS.values())
    found[""] = [
        ("line", rf"(?P<n>\u27e6)[ ]?(?:(?:the )?(?:correct |final )?(?:{names})(?:[ :]{{0,2}}(?:{fills})){{0,3}})?{any_case}"
         rf"(?![ ]?[+^/=*<>]|[ ](?-i:{upper}){LETTER_END})"),
        ("alone", rf"(?P<n>)\A{any_case}{CLOSING}\Z"),
        ("last option", rf"(?<!\w)(?P<n>)(?:{THEREFORE}|it's|it is|c'est|es ist)[ ,:]{{0,3}}{one}{CLOSING}\Z"),
        ("line alone", rf"(?m)^(?P<n>){any_case}{CLOSING}$"),
        ("opener", rf"(?m)^(?P<n>)(?:(?:{options})[ ]|[ (\[\"']{{0,4}})(?P<x>(?-i:{upper}))(?![{WORD_SIGNS}])"
         r"(?:[.:\]]|(?<!\(.)\)|\)(?![^\W_]| (?-i:[a-z])))"),
    ]  # fmt: skip
    return {language: [(kind, _compiled(text)) for kind, text in entries] for language, entries in found.items()}


def _stands(text: str, kind: str, found: re.Match) -> bool:
    """Whether a match is a statement: neither taken back nor asked, nor the beginning of other words."""
    if DENIED_AFTER.match(text, found.end()):
        return kind == "opener"  # it still opens a line
    if kind in ("alone", "line alone", "opener"):
        return True
    before = text[max(0, found.start("n") - 60) : found.start("n")].rpartition("\n\n")[2]
    if DENIED_BEFORE.search(before):
        return False
    if kind in ("answer", "good option") and (ARTICLE.match(text, found.end("x")) or LISTED.match(text, found.end("x"))):
        return False
    if kind in ("right option", "right", "last option", "lone option") and (
        HEDGED.search(before) or OF_WHAT.match(text, found.end())
    ):
        return False
    if kind in ("last option", "lone option") and DENIED_OPTION.search(before):
        return False
    return kind not in ("right", "lone option") or bool(NAMED.search(before))


def extract_letter(answer: str, letters: str) -> str | None:
    """The option letter that an answer states, or None. ``letters``: the options that exist, such as "ABCD".

    In order: the last \\boxed{X} or line "Answer: X", whichever is later; the last "answer is X"; the last "correct option is
    X"; "option X is correct" or "option X" at the end; "X is correct"; a text, or its first or last line, that is nothing but a
    letter; the letter that opens a line, if only one does. Two letters ("A or B") are no answer.
    """
    text = folded(answer).strip()
    stated: dict[str, list[re.Match]] = {}
    for language, entries in _patterns(letters).items():
        if not language or _sign(language).search(text):
            for kind, pattern in entries:
                stated.setdefault(kind, []).extend(match for match in pattern.finditer(text) if _stands(text, kind, match))
    for kind in ("line", "answer", "good option"):
        if matches := stated.get(kind):
            firm = [match for match in matches if not (WOULD.search(match[0]) or CONDITION.match(text, match.end("x")))]
            return latin(max(firm or matches, key=lambda match: match.start("x"))["x"])
    for kinds in (("right option", "last option", "lone option"), ("right",), ("alone",), ("line alone",), ("opener",)):
        if matches := [match for kind in kinds for match in stated.get(kind, [])]:
            if kinds == ("line alone",) and matches[0].start() and matches[-1].end() < len(text):
                continue
            different = {latin(match["x"]) for match in matches}
            denied = kinds == ("opener",) and DENIED_AFTER.match(text, matches[0].end())
            return different.pop() if len(different) == 1 and not denied else None
    return None
