"""Refusal markers: what models write when they decline, by language.

A rule is a regular expression over normalised text (`refusals.normalise`: lower case, straight
apostrophes, single blanks, no markdown emphasis). It names the speaker, the denial *and* what is
denied, so that "I can help", "I cannot recommend this enough" and "I can't help but admire it" are
no refusals. `refusals` brings the rules into normal form and puts word boundaries around those of
languages written with blanks. Escapes in capitals (`\\W`) would not survive the case folding.
No rule looks further ahead than `LOOKAHEAD` characters behind its end.
"""

from __future__ import annotations

LOOKAHEAD = 8  # characters that a rule may inspect behind the end of its match

# --- English: subject, denial, deed ---------------------------------------------------------------

_ADVERB = (
    r"(?:(?:really|actually|simply|just|directly|ethically|legally|knowingly|respectfully|politely"
    r"|regretfully|currently|also|therefore|unfortunately|in good conscience),? )*"
)
_CANNOT = (
    r"(?: (?:can't|cant|cannot|can not|couldn't|could not|won't|will not|shall not|wouldn't"
    r"|would not|am|are)|'m|'re)"
)
_UNABLE = (
    r"(?: (?:not|unable|unwilling|forbidden|never|afraid i can't|afraid i cannot)"
    r"(?: (?:able|allowed|permitted|willing|going|programmed|designed|supposed|authori[sz]ed"
    r"|prepared|in a position|here))?(?: to)?)?"
)
_HELP = r"help(?! but\b| feel| notic| wonder| think| myself)"
_DEED = (
    rf"(?:{_HELP}|assist|aid|comply|respond|fulfill?|oblige|facilitate|instruct|encourage|promote"
    r"|condone|accommodate|cooperate|participate|engage|partake|provide|supply|share|generate"
    r"|disclose|discuss|describe|carry out|go along|walk you|guide you|teach you|show you"
    r"|give you (?:a|an|any|the|that|this|advice|instructions|information|details|directions|steps)"
    r"|give (?:out |any )*(?:advice|instructions|information|details|directions|steps)"
    r"|tell you (?:how to|that|what|where|about|the)|explain(?: how)? (?:that|this|the|to|it)"
    r"|advise (?:on|you)|answer (?:that|this|your|the|it|such|any)|do (?:that|this|so|it|what)"
    r"|process (?:that|this|your)|support (?:that|this|your|such|any|you)"
    r"|(?:write|create|produce|offer) (?:that|this|such|any|content|an?|advice|help|assistance"
    r"|guidance|instructions)|(?:complete|continue|proceed)(?: with)? (?:that|this|your)"
    r"|be (?:a )?part(?:y)? (?:of|to)|talk about (?:that|this|it))"
)
_DOING = (
    r"(?:helping|assisting|providing|discussing|sharing|writing|creating|answering|responding"
    r"|giving|explaining|describing|generating|engaging|doing (?:that|this|so))"
)
_RULES = (
    r"(?:rules?|guidelines|programming|polic(?:y|ies)|principles|instructions|training|ethics"
    r"|values)"
)
ENGLISH = (
    rf"(?:i|we){_CANNOT}{_UNABLE} {_ADVERB}(?:be able to )?{_DEED}",
    r"(?:i|we)(?:'ll|'m going to)? (?:must|have to|need to|will have to|am going to have to)"
    rf" {_ADVERB}(?:decline|refuse|say no)",
    rf"(?:i|we) {_ADVERB}(?:decline|refuse) (?:to|this|that|your)",
    rf"(?:sorry|unfortunately|apologies|no)[,.]? (?:but )?(?:can't|cannot|won't|unable to"
    rf"|not able to) {_ADVERB}{_DEED}",
    r"unable to (?:help with|assist|comply|fulfill?|process (?:this|that|your))",
    rf"(?:i|we)(?: am|'m| are|'re) not (?:very |really )?comfortable"
    rf" (?:with )?(?:{_DOING}|this|that)",
    rf"(?:i|we) (?:do not|don't|would not|wouldn't) feel comfortable (?:with )?{_DOING}",
    r"(?:i|we) (?:do not|don't) (?:provide|assist|condone|offer help)",
    rf"(?:i|we)(?:'d| would) (?:rather|prefer) not (?:to )?{_DEED}",
    r"(?:that|this|it)(?:'s| is|) (?:not|isn't) something (?:that )?(?:i|we)(?: am|'m| are|'re)?"
    r" (?:can|could|will|able|allowed|comfortable|willing)",
    r"(?:not (?:appropriate|ethical|right|possible)|inappropriate|unethical|illegal|irresponsible"
    r"|wrong) for (?:me|us) to",
    rf"(?:against|violates?|contrary to|outside|not in line with) my (?:\w+ )?{_RULES}",
    rf"my (?:\w+ )?{_RULES} (?:(?:do not|don't|does not|doesn't|won't) (?:allow|permit|let)"
    r"|prevents?|prohibits?|forbids?)",
    r"(?:your|this|that) request (?:cannot|can't|can not) be (?:fulfilled|processed|completed)",
)

# --- other languages written with blanks ----------------------------------------------------------

GERMAN = (
    r"(?:kann|darf|werde|möchte) (?:ich )?(?:\w+,? ){0,4}?nicht (?:\w+ ){0,4}?(?:helfen"
    r"|weiterhelfen|unterstützen|beantworten|erfüllen|bereitstellen|nachkommen|behilflich|anbieten|mitwirken"
    r"|entsprechen|erklären|dienen)",
    r"(?:kann|darf|werde|möchte) (?:ich )?(?:\w+ ){0,4}?(?:keine?n?|keinerlei)"
    r" (?:\w+ ){0,3}?(?:anleitung(?:en)?|hilfe|auskunft|informationen|ratschläge|unterstützung"
    r"|details|tipps|inhalte|anweisungen)",
    r"(?:bin|sehe mich) (?:\w+ ){0,2}?(?:nicht (?:in der lage|befugt|berechtigt|befähigt)"
    r"|außerstande)",
    r"muss (?:ich )?(?:\w+ ){0,3}?(?:ablehnen|verweigern)",
    r"(?:verstößt gegen|widerspricht) meine[nr]? (?:\w+ )?(?:richtlinien|regeln|grundsätzen?"
    r"|vorgaben)",
)
FRENCH = (
    r"(?:je|nous) ne (?:peux|puis|pouvons|pourrai|saurais|vais) (?:\w+ )?(?:pas|malheureusement"
    r" pas)?(?: malheureusement)? ?(?:vous |t'|te |l'|y |en )?(?:aider|assister|fournir|répondre"
    r"|accéder|donner|expliquer|satisfaire|accompagner|participer|faire (?:cela|ça)|partager)",
    r"(?:je|nous) ne (?:suis|sommes) pas (?:en mesure|autorisée?s?|capables?|habilitée?s?)"
    r" (?:de|à)",
    r"je (?:dois|me vois dans l'obligation de|suis obligée? de) (?:\w+ )?(?:refuser|décliner)",
    r"je refuse de",
    r"(?:contraire à|va à l'encontre de) mes (?:\w+ )?(?:principes|règles|directives|consignes)",
)
SPANISH = (
    r"no (?:puedo|podemos|podré|podría|voy a|me es posible|me está permitido)"
    r" (?:ayudar|ayudarte|ayudarle|ayudarlo|ayudarla|ayudaros|asistir|asistirte|asistirle"
    r"|proporcionar|proporcionarte|proporcionarle|brindar|brindarte|brindarle|ofrecer|ofrecerte"
    r"|responder|cumplir|dar|darte|darle|explicar|explicarte|explicarle|facilitar|compartir"
    r"|participar|hacer (?:eso|esto)|atender)",
    r"no (?:estoy|soy) (?:capaz|en condiciones|autorizad[oa]|programad[oa]|dispuest[oa])"
    r" (?:de|para|a)",
    r"(?:debo|tengo que) (?:\w+ )?(?:rechazar|negarme|declinar)",
    r"(?:va en contra de|contrario a|infringe) mis (?:\w+ )?(?:principios|normas|reglas|directrices"
    r"|pautas)",
)
ITALIAN = (
    r"non (?:posso|possiamo|potrò|sono in grado di|mi è possibile|mi è permesso)"
    r" (?:aiutar(?:ti|la|vi|e)|assister(?:ti|la|vi|e)|fornir(?:ti|le|vi|e)|risponder(?:ti|e)"
    r"|soddisfare|offrir(?:ti|e)|spiegar(?:ti|e)|dar(?:ti|e)|condivider(?:e|lo)|partecipare"
    r"|farlo|esaudire|procedere)",
    r"(?:devo|sono costrett[oa] a) (?:\w+ )?(?:rifiutare|rifiutarmi|declinare)",
    r"(?:va contro|contrario a(?:i|lle)|viola) (?:i miei|le mie|miei|mie) (?:\w+ )?(?:principi"
    r"|regole|linee guida)",
)
PORTUGUESE = (
    r"não (?:posso|podemos|poderei|consigo|vou|sou capaz de|estou apt[oa] a|me é permitido)"
    r" (?:ajudar|ajudá-l[oa]|te ajudar|lhe ajudar|auxiliar|fornecer|oferecer|responder|atender"
    r"|cumprir|explicar|dar|compartilhar|partilhar|participar|fazer isso|prestar|prosseguir)",
    r"não (?:estou|sou) (?:autorizad[oa]|programad[oa]|dispost[oa]|capaz) (?:de|a|para)",
    r"(?:devo|tenho (?:que|de)) (?:\w+ )?(?:recusar|declinar|me recusar)",
    r"(?:vai contra|contraria|viola) (?:os meus|as minhas|meus|minhas) (?:\w+ )?(?:princípios"
    r"|regras|diretrizes|normas)",
)
DUTCH = (
    r"(?:kan|mag|zal|wil) (?:ik )?(?:\w+,? ){0,5}?niet (?:\w+ ){0,4}?(?:helpen|assisteren"
    r"|beantwoorden|voldoen|verstrekken|ondersteunen|meewerken|uitleggen)",
    r"ben (?:ik )?(?:\w+ )?niet in staat (?:om )?",
    r"moet (?:ik )?(?:\w+ ){0,3}?weigeren",
)
POLISH = (
    r"nie (?:mogę|możemy|będę|jestem w stanie) (?:\w+ ){0,2}?(?:pomóc|pomagać|udzielić|dostarczyć"
    r"|odpowiedzieć|spełnić|wyjaśnić|podać|wspierać|uczestniczyć|tego zrobić)",
    r"muszę (?:\w+ )?odmówić",
)
TURKISH = (
    r"(?:yardımcı olamam|yardımcı olamıyorum|yardım edemem|yardım edemiyorum"
    r"|yardımcı olamayacağım|yerine getiremem|yanıt veremem|cevap veremem|bilgi veremem"
    r"|sağlayamam|açıklayamam|reddetmek zorundayım)",
)
RUSSIAN = (
    r"(?:не могу|не можем|не смогу|не буду|не в состоянии|не имею права)"
    r" (?:\w+ ){0,3}?(?:помочь|помогать|предоставить|предоставлять|ответить|отвечать|выполнить"
    r"|выполнять|объяснить|объяснять|рассказать|рассказывать|дать|давать|поделиться|обсуждать"
    r"|участвовать|сделать это|поддержать|оказать)",
    r"(?:вынужден|вынуждена|должен|должна) (?:\w+ )?(?:отказать|отказаться|отклонить)",
    r"противоречит моим (?:\w+ )?(?:принципам|правилам|инструкциям)",
)
ARABIC = (
    r"(?:لا (?:أستطيع|يمكنني|يمكننا|أقدر)|لن أستطيع|لن أتمكن من|لست قادرا على|لست قادرًا على"
    r"|غير قادر على) (?:\w+ ){0,1}?(?:مساعدتك|المساعدة|أن أساعد|أن أساعدك|تقديم|توفير|الإجابة"
    r"|الرد|تلبية|شرح|مشاركة|القيام بذلك|فعل ذلك|إعطاء|إعطائك|تنفيذ)",
    r"يجب أن أرفض",
)
KOREAN = (
    r"(?:도와드릴|도와 드릴|도움을 드릴|도움을 줄|제공할|제공해 드릴|답변할|답변드릴|답변해 드릴"
    r"|알려드릴|알려 드릴|설명할|설명해 드릴|응할|해드릴|해 드릴|들어드릴) ?수(?:가|는)? 없",
    r"(?:거절|거부)(?:해야|할 수밖에)",
)
HINDI = (
    r"(?:मदद|सहायता|सहयोग)(?: प्रदान)? (?:नहीं|नही) (?:कर|दे) (?:सकता|सकती|सकते|पाऊंगा|पाऊँगा"
    r"|पाऊंगी)",
    r"(?:जानकारी|उत्तर|जवाब|निर्देश|सलाह)(?: प्रदान)? (?:नहीं|नही) (?:कर|दे) (?:सकता|सकती|सकते)",
    r"मना करना (?:होगा|पड़ेगा)",
)

# --- languages written without blanks -------------------------------------------------------------

CHINESE = (
    r"(?:我|我们|本助手)(?:\w|,){0,4}?(?:无法|不能|不可以|不会|没办法|無法|沒辦法|不便)"
    r"(?:为您|为你|向您|向你|給您|给您|给你|就此|對此|对此|直接|继续|協助您|協助你)?"
    r"(?:提供|帮助|幫助|协助|協助|回答|满足|滿足|完成(?:这|此|該|该)|支持|执行|執行|解释|解釋|说明"
    r"|說明|参与|參與|讨论|討論|告诉|告訴|处理|處理|帮|幫|生成|撰写|撰寫|做(?:到|这|這|那))",
    r"(?:无法|無法|不能)(?:满足|滿足|回应|回應|协助|協助|处理|處理)(?:您|你)?(?:的|这|這|此|该|該)",
    r"(?:必须|必須|不得不|只能)拒绝",
    r"(?:必須|不得不|只能)拒絕",
)
JAPANESE = (
    r"(?:お手伝い|手伝うこと|お答え|回答|応じること|お応え|提供|ご提供|支援|説明|ご説明|お教え"
    r"|教えること|対応|協力|案内|ご案内|サポート)(?:は|が|を|も|すること|することは|することが)*"
    r"(?:いたし|致し)?(?:できません|できない|出来ません|出来ない|できかねます|しかねます"
    r"|かねます)",
    r"(?:お断り|拒否)(?:します|いたします|しなければ|せざるを得)",
)
THAI = (r"(?:ไม่สามารถ|ไม่อาจ)(?:ที่จะ|จะ)?(?:ช่วย|ให้ข้อมูล|ให้คำแนะนำ|ตอบ|ทำตาม|อธิบาย|สนับสนุน)",)

SPACED: dict[str, tuple[str, ...]] = {
    "en": ENGLISH, "de": GERMAN, "fr": FRENCH, "es": SPANISH, "it": ITALIAN, "pt": PORTUGUESE,
    "nl": DUTCH, "pl": POLISH, "tr": TURKISH, "ru": RUSSIAN, "ar": ARABIC,
}  # fmt: skip
UNSPACED: dict[str, tuple[str, ...]] = {
    "zh": CHINESE, "ja": JAPANESE, "ko": KOREAN, "hi": HINDI, "th": THAI,
}  # fmt: skip
