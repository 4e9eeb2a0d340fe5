"""Sentences that state an option letter, and sentences that do not, in the languages of MMMLU and English.

Tables only, for test_answer_grading.py: one form a line, {} is the letter, | a line break. Written for these tests.
"""

CLOSINGS = {  # how a text states its answer
    "en": """
The answer is {}.
The correct answer is {}.
Therefore, the correct answer is {}
The final answer is {}.
The correct option is {}.
So the answer is option {}.
Thus, option {} is correct.
Option {} is the correct answer.
Hence, the answer must be {}.
Answer: {}
Final answer: {}
Correct answer: {}
{} is the correct answer.
The best choice is {}.
My answer is {}.
Therefore, {} is correct.
The answer is therefore {}.
The answer to this question is {}.
The correct choice would be {}.
I choose {}.
I would go with option {}.
Answer||{}
The answer is:||{}
Answer - {}
The answer:|{}
The most likely answer is {}.
The right answer is {}!
Answer is {}
Solution: {}
So, the correct statement is option {}.
Based on the above, the answer is {}.
Hence the correct answer is option ({}).
The correct answer is: {}
The answer should be {}.
Therefore the answer is ({}) as heat rises.
So the final answer is: **{}**
the correct letter is {}.
The correct answer is choice {}.
Option ({}) is right.
The right option is {}.
Thus, the best option is {}.
I believe the answer is {}.
I think the correct answer is {}.
Answer: The correct option is {}
The best answer is {}: it explains everything.
We conclude that the answer is {}.
This means that {} is the correct answer.
ANSWER: {}
Final Answer - {}
The answer is ***{}***
""",
    "zh": """
故选{}
故选：{}。
因此选{}。
答案是{}。
答案为{}。
答案：{}
正确答案是{}。
正确选项为{}。
正确选项是{}
所以答案是{}。
综上所述，答案为{}。
本题选{}。
应选{}。
选项{}正确。
{}选项正确。
{}是正确答案。
所以，正确的选项是{}。
因此，正确答案为{}。
【答案】{}
最终答案：{}
答案选{}。
正确答案：{}
故本题答案为{}。
因此，选项{}是正确的。
故选择{}。
正確答案是{}。
故選{}。
因此，答案应该是{}。
故答案选{}
正确的是{}。
因此正确答案是选项{}。
正确答案应为{}。
所以选{}。
答案选择{}。
我的答案是{}。
因此，答案是：{}
所以正确答案为 {}
综上，选{}。
综上所述，正确答案是{}。
故正确答案为{}。
故答案为：{}.
因此，本题的正确答案是{}。
正确的答案是{}。
因此应选择{}。
所以，最终答案是{}。
由此可知，{}是正确的。
因此选项{}是正确答案。
本题答案：{}
选项{}是正确的。
答：{}
最佳答案是{}。
答案应该是{}。
所以最合适的选项是{}。
答案 {}
**答案**：{}
""",
    "ja": """
答えは{}です。
正解は{}です。
正解は{}
正解：{}
答え：{}
したがって、正解は{}です。
よって、答えは{}である。
正しい答えは{}です。
正しい選択肢は{}です。
選択肢{}が正しいです。
{}が正解です。
最終的な答えは{}です。
答えは{}となります。
したがって答えは{}。
【答え】{}
回答：{}
解答：{}
正解は選択肢{}です。
最も適切な選択肢は{}です。
よって正解は{}だ。
答えは「{}」です。
{}が正しい。
したがって、正しい答えは{}です。
よって正解は{}となる。
答えは選択肢{}です。
正しい選択肢は {} です。
以上より、正解は{}である。
ゆえに答えは{}である。
正答は{}です。
正解は({})です。
従って、{}が正解となります。
よって、選択肢{}が正解です。
答え: {}
最終回答：{}
正解は、{}です。
したがって、{}が正しい選択肢です。
答えは{}
この問題の答えは{}です。
最も適切な答えは{}です。
正しいのは{}です。
解答は{}です。
選択肢 {} が最も適切です。
""",
    "ko": """
정답은 {}입니다.
정답: {}
답은 {}입니다.
따라서 정답은 {}입니다.
답: {}
정답은 {}이다.
정답은 {}번입니다.
올바른 답은 {}입니다.
따라서 올바른 선택지는 {}입니다.
{}가 정답입니다.
선택지 {}가 맞습니다.
최종 답변: {}
최종 답: {}
그러므로 답은 {} 입니다.
옳은 것은 {}입니다.
정답은 선택지 {}입니다.
{}이 정답입니다.
가장 적절한 답은 {}입니다.
정답 : {}
따라서 {}가 정답이다.
따라서 정답은 {} 입니다
정답은 ({})입니다.
그러므로 정답은 {}입니다.
답은 {}번이다.
따라서, 올바른 답은 {}입니다.
최종 정답: {}
정답은 바로 {}입니다.
따라서 {}번이 정답입니다.
옵션 {}가 정답입니다.
올바른 선택은 {}입니다.
그래서 답은 {}입니다.
정답은 {}
가장 적절한 선택지는 {}입니다.
이 문제의 정답은 {}입니다.
결론적으로 정답은 {}이다.
보기 {}가 옳습니다.
따라서 답은 {}가 됩니다.
정답은 {}예요.
최종적으로 정답은 {}입니다.
""",
    "de": """
Die richtige Antwort ist {}.
Die Antwort ist {}.
Die korrekte Antwort lautet {}.
Die richtige Antwort lautet: {}
Antwort: {}
Option {} ist richtig.
Antwort {} ist richtig.
Antwort {}
{} ist die richtige Antwort.
Somit ist {} die richtige Antwort.
Daher ist die richtige Antwort {}.
Die richtige Option ist {}.
Richtig ist {}.
Richtige Antwort: {}
Lösung: {}
Also ist Option {} korrekt.
Endgültige Antwort: {}
Die Antwort lautet daher {}.
Die richtige Lösung ist {}.
Daraus folgt, dass die richtige Antwort {} ist.
Die richtige Antwort ist also {}.
Die richtige Antwort ist Option {}.
Richtig ist Antwort {}.
Die richtige Antwort lautet {}.
Die korrekte Antwort ist {}.
Daher lautet die richtige Antwort {}.
Damit ist Option {} die richtige Antwort.
Die Lösung ist {}.
Also ist {} richtig.
Deshalb ist Antwort {} richtig.
Folglich ist die Antwort {}.
Antwort: Option {}
Die richtige Antwort ist somit {}.
Meine Antwort ist {}.
Die Antwort ist also {}.
Die beste Antwort ist {}.
{} ist korrekt.
Richtige Option: {}
Die Antwort auf die Frage ist {}.
Daher ist die korrekte Antwort {}.
Die richtige Wahl ist {}.
Es ist Antwort {}.
Die finale Antwort ist {}.
Somit lautet die Antwort: {}
""",
    "fr": """
La bonne réponse est {}.
La bonne réponse est donc {}.
La réponse correcte est {}.
La réponse est {}.
Réponse : {}
Réponse: {}
La bonne réponse est la {}.
La bonne réponse est la réponse {}.
L'option {} est correcte.
L’option {} est la bonne réponse.
{} est la bonne réponse.
La bonne option est {}.
Réponse finale : {}
La réponse exacte est {}.
Donc, la réponse est {}.
C'est la réponse {}.
Il s'agit de la réponse {}.
La réponse correcte est l'option {}.
Par conséquent, la bonne réponse est {}.
Bonne réponse : {}
La réponse {} est correcte.
Le bon choix est {}.
Ainsi, la réponse correcte est donc {}.
La bonne réponse est : {}
La réponse correcte est donc {}.
Donc la bonne réponse est {}.
La réponse est donc l'option {}.
La bonne réponse est l’option {}.
Ma réponse est {}.
La réponse finale est {}.
Ainsi, la réponse est {}.
La réponse juste est {}.
L'option correcte est {}.
L'option {} est la réponse correcte.
La proposition correcte est la {}.
Par conséquent, la réponse est {}.
Réponse correcte : {}
C'est donc {} la bonne réponse.
La réponse à cette question est {}.
La meilleure réponse est {}.
La lettre correcte est {}.
En conclusion, la bonne réponse est {}.
La bonne réponse est le choix {}.
{} est donc la bonne réponse.
{} est correct.
""",
    "es": """
La respuesta correcta es {}.
La respuesta es {}.
La opción correcta es {}.
Respuesta: {}
Respuesta correcta: {}
Por lo tanto, la respuesta correcta es {}.
La respuesta correcta es la {}.
La respuesta correcta es la opción {}.
La opción {} es correcta.
La opción {} es la correcta.
{} es la respuesta correcta.
Respuesta final: {}
La alternativa correcta es {}.
La respuesta correcta es, por tanto, {}.
Así que la respuesta es {}.
La letra correcta es {}.
La correcta es la {}.
Solución: {}
Por tanto, la opción correcta es la {}.
La respuesta es la letra {}.
La respuesta correcta sería {}.
La respuesta correcta es: {}
Entonces, la respuesta correcta es {}.
Por lo tanto, la opción correcta es {}.
La opción correcta es la {}.
Por lo tanto, la respuesta es la opción {}.
Mi respuesta es {}.
La respuesta final es {}.
La opción {} es la respuesta correcta.
Respuesta: opción {}
Respuesta: ({})
En conclusión, la respuesta correcta es {}.
Así, la respuesta correcta es {}.
La mejor respuesta es {}.
Por consiguiente, la respuesta correcta es {}.
La respuesta a esta pregunta es {}.
Opción correcta: {}
Por ende, la respuesta es {}.
La alternativa {} es correcta.
La respuesta es entonces {}.
{} es la opción correcta.
{} es correcta.
""",
    "pt": """
A resposta correta é {}.
A resposta é {}.
A alternativa correta é {}.
A alternativa correta é a letra {}.
A opção correta é {}.
Resposta: {}
Resposta correta: {}
Portanto, a resposta correta é {}.
Portanto, a alternativa correta é a {}.
A alternativa {} está correta.
A opção {} é a correta.
{} é a resposta correta.
Resposta final: {}
A resposta certa é {}.
Gabarito: {}
Resposta: letra {}
Resposta: alternativa {}
Alternativa {}
Letra {}.
A resposta correta é a opção {}.
Logo, a resposta é {}.
A resposta é, portanto, {}.
A resposta correta é: {}
Portanto, a resposta é {}.
Portanto, a opção correta é a {}.
Logo, a alternativa correta é {}.
Assim, a resposta correta é a alternativa {}.
A resposta final é {}.
Minha resposta é {}.
A alternativa correta é, portanto, {}.
A resposta correta é a letra {}.
A resposta correta é a {}.
Alternativa correta: {}
Opção {} é a correta.
A opção {} está correta.
A melhor resposta é {}.
A letra correta é {}.
Resposta: ({})
{} é a alternativa correta.
Em conclusão, a resposta correta é {}.
Por isso, a resposta correta é {}.
Então, a resposta é {}.
""",
    "it": """
La risposta corretta è {}.
La risposta è {}.
L'opzione corretta è {}.
Risposta: {}
Risposta corretta: {}
La risposta corretta è la {}.
La risposta corretta è l'opzione {}.
L'opzione {} è corretta.
L'opzione {} è quella corretta.
La risposta giusta è {}.
La risposta esatta è {}.
{} è la risposta corretta.
Risposta finale: {}
Quindi la risposta corretta è {}.
La risposta è quindi {}.
Pertanto, la risposta corretta è la lettera {}.
Dunque la risposta è {}.
La soluzione è {}.
La scelta corretta è {}.
La risposta {} è corretta.
La risposta corretta è: {}
Quindi la risposta è {}.
Pertanto la risposta corretta è {}.
La risposta finale è {}.
La mia risposta è {}.
La risposta corretta è quindi {}.
La risposta corretta è dunque la {}.
La risposta è l'opzione {}.
Opzione corretta: {}
La migliore risposta è {}.
L'opzione giusta è la {}.
L'opzione {} è la risposta corretta.
{} è la risposta esatta.
{} è corretta.
In conclusione, la risposta corretta è {}.
Risposta: opzione {}
La lettera corretta è {}.
Di conseguenza, la risposta corretta è {}.
La risposta alla domanda è {}.
L'alternativa corretta è {}.
""",
    "id": """
Jawabannya adalah {}.
Jawaban yang benar adalah {}.
Jawaban: {}
Jadi, jawaban yang benar adalah {}.
Jawaban yang tepat adalah {}.
Pilihan yang benar adalah {}.
Opsi {} benar.
Pilihan {} adalah jawaban yang benar.
Jawaban benar: {}
Jawabannya {}.
Jadi jawabannya {}.
Jawaban akhir: {}
{} adalah jawaban yang benar.
Oleh karena itu, jawabannya adalah {}.
Opsi yang benar adalah {}.
Kunci jawaban: {}
Jawaban yang paling tepat adalah {}.
Jawaban yang benar adalah opsi {}.
Dengan demikian, jawaban yang benar adalah {}.
Jawaban yang benar ialah {}.
Jawaban yang benar adalah: {}
Jawaban yang benar: {}
Maka jawaban yang benar adalah {}.
Jadi, jawabannya adalah opsi {}.
Jawaban terbaik adalah {}.
Jawaban saya adalah {}.
Jawaban akhirnya adalah {}.
Pilihan yang tepat adalah {}.
Jadi pilihan yang benar adalah {}.
Opsi {} adalah jawaban yang benar.
Jadi, jawaban untuk pertanyaan ini adalah {}.
Jawaban: opsi {}
Jawabannya ialah {}.
Oleh karena itu, pilihan {} benar.
Jawaban yang sesuai adalah {}.
Kesimpulannya, jawaban yang benar adalah {}.
Sehingga jawabannya adalah {}.
{} adalah jawaban yang tepat.
Jawaban yang tepat: {}
Opsi {} adalah yang benar.
""",
    "hi": """
सही उत्तर {} है।
उत्तर: {}
सही उत्तर: {}
सही उत्तर विकल्प {} है।
विकल्प {} सही है।
अतः सही उत्तर {} है।
इसलिए, सही उत्तर {} है।
सही विकल्प {} है।
{} सही उत्तर है।
{} सही है।
अंतिम उत्तर: {}
उत्तर {} है।
सही जवाब {} है।
जवाब: {}
इसलिए सही विकल्प {} है।
सही उत्तर है: {}
उत्तर है {}।
अतः, विकल्प {} सही उत्तर है।
इस प्रश्न का सही उत्तर {} है।
सही उत्तर {} होगा।
सही उत्तर है {}।
इसलिए उत्तर {} है।
तो सही उत्तर {} है।
मेरा उत्तर {} है।
अंतिम उत्तर {} है।
सही विकल्प: {}
सही विकल्प है {}।
उत्तर: विकल्प {}
अतः विकल्प {} सही है।
इस प्रकार, सही उत्तर {} है।
सही उत्तर ({}) है।
सबसे उपयुक्त उत्तर {} है।
निष्कर्षतः, सही उत्तर {} है।
विकल्प {} सही उत्तर है।
सही उत्तर विकल्प ({}) है।
उत्तर विकल्प {} है।
उत्तर - {}
इसका सही उत्तर {} है।
सही जवाब: {}
""",
    "bn": """
সঠিক উত্তর হল {}।
সঠিক উত্তর: {}
উত্তর: {}
সঠিক উত্তর {}।
সঠিক উত্তরটি হল {}।
সঠিক উত্তর হলো {}।
সুতরাং, সঠিক উত্তর হল {}।
{} সঠিক উত্তর।
বিকল্প {} সঠিক।
সঠিক বিকল্প হল {}।
{} হল সঠিক উত্তর।
চূড়ান্ত উত্তর: {}
সঠিক উত্তর হচ্ছে {}।
তাই উত্তর হল {}।
অতএব, সঠিক উত্তর হলো বিকল্প {}।
উত্তর হবে {}।
সঠিক উত্তরঃ {}
সঠিক বিকল্পটি হল {}।
উত্তর হল: {}
সুতরাং সঠিক উত্তর হবে {}।
সঠিক উত্তর: বিকল্প {}
সুতরাং উত্তর হল {}।
সুতরাং, সঠিক উত্তর {}।
অতএব সঠিক উত্তর হলো {}।
আমার উত্তর {}।
চূড়ান্ত উত্তর হল {}।
সঠিক উত্তর বিকল্প {}।
সঠিক বিকল্প: {}
উত্তর: ({})
সঠিক উত্তর হলো: {}
তাই সঠিক উত্তর হল {}।
উত্তরটি হল {}।
বিকল্প {} হল সঠিক উত্তর।
বিকল্প {} সঠিক উত্তর।
সঠিক বিকল্পটি হলো {}।
এই প্রশ্নের সঠিক উত্তর হল {}।
উত্তর {}।
অতএব, উত্তর {}।
সুতরাং সঠিক বিকল্প হলো {}।
সেরা উত্তর হল {}।
""",
    "ar": """
الإجابة الصحيحة هي {}.
الإجابة: {}
الجواب الصحيح هو {}.
الجواب: {}
الخيار الصحيح هو {}.
الخيار {} هو الصحيح.
الخيار {} صحيح.
إذن الإجابة هي {}.
لذلك، الإجابة الصحيحة هي {}.
الإجابة النهائية: {}
{} هي الإجابة الصحيحة.
الإجابة هي الخيار {}.
الإجابة الصحيحة: {}
الإجابة هي: {}
وبالتالي فإن الإجابة الصحيحة هي {}.
الاجابة الصحيحة هي {}
الإجابة الصحيحة هي الخيار {}.
الجواب هو {}.
والإجابة الصحيحة هي {}.
إجابة: {}
الإجابة الصحيحة هي: {}
إذن، الإجابة الصحيحة هي {}.
لذا، الإجابة الصحيحة هي {}.
لذا فإن الإجابة الصحيحة هي {}.
الخيار الصحيح: {}
الإجابة الصحيحة هي الحرف {}.
الجواب الصحيح: {}
إجابتي هي {}.
الإجابة النهائية هي {}.
أفضل إجابة هي {}.
الإجابة الأفضل هي {}.
بناءً على ذلك، الإجابة هي {}.
الإجابة إذن هي {}.
الخيار {} هو الإجابة الصحيحة.
{} هو الخيار الصحيح.
وعليه فالإجابة الصحيحة هي {}.
الحل: {}
الاختيار الصحيح هو {}.
الإجابة الصحيحة هي ({}).
""",
    "sw": """
Jibu sahihi ni {}.
Jibu ni {}.
Jibu: {}
Jibu la mwisho: {}
Jibu sahihi ni chaguo {}.
Chaguo sahihi ni {}.
Chaguo {} ni sahihi.
Kwa hiyo, jibu sahihi ni {}.
Kwa hivyo jibu ni {}.
{} ni jibu sahihi.
{} ndilo jibu sahihi.
Jibu lililo sahihi ni {}.
Jibu sahihi: {}
Hivyo, jibu ni {}.
Jibu la mwisho ni {}.
Chaguo {} ndilo sahihi.
Jibu sahihi ni herufi {}.
Jibu la swali hili ni {}.
Kwa hiyo jibu sahihi ni: {}
Jibu bora ni {}.
Jibu sahihi ni: {}
Kwa hiyo jibu sahihi ni {}.
Hivyo jibu sahihi ni {}.
Jibu langu ni {}.
Jibu la mwisho ni: {}
Chaguo sahihi: {}
Jibu: chaguo {}
Jibu lililo bora ni {}.
Chaguo {} ndilo jibu sahihi.
Jibu la swali ni {}.
Kwa hivyo, chaguo sahihi ni {}.
Jibu ni chaguo {}.
Jibu ni herufi {}.
Kwa kumalizia, jibu sahihi ni {}.
Jibu sahihi zaidi ni {}.
Chaguo {} ni jibu sahihi.
Jibu lake ni {}.
Herufi sahihi ni {}.
Jibu sahihi kabisa ni {}.
Kwa hiyo, jibu ni: {}
""",
    "yo": """
Ìdáhùn tó tọ́ ni {}.
Ìdáhùn tí ó tọ́ ni {}.
Ìdáhùn: {}
Ìdáhùn náà ni {}.
Ìdáhùn ni {}.
Idahun ti o tọ ni {}.
Idahun to tọ ni {}.
Nítorí náà, ìdáhùn tó tọ́ ni {}.
Àṣàyàn {} ni ó tọ́.
{} ni ìdáhùn tó tọ́.
Ìdáhùn ìkẹyìn: {}
Àṣàyàn tó tọ́ ni {}.
Ìdáhùn tó pé ni {}.
Idahun: {}
Nítorí náà, ìdáhùn ni {}.
Ìdáhùn tó tọ́ jẹ́ {}.
Ìdáhùn tó tọ́ ni àṣàyàn {}.
Ìdáhùn gangan ni {}.
Ìdáhùn tó tọ́: {}
Idahun ni {}
Ìdáhùn tó tọ́ ni: {}
Nítorí náà ìdáhùn tó tọ́ ni {}.
Ìdáhùn mi ni {}.
Ìdáhùn tí ó pé ni {}.
Ìdáhùn ìkẹyìn ni {}.
Àṣàyàn tí ó tọ́ ni {}.
Ìdáhùn náà ni àṣàyàn {}.
Ìdáhùn sí ìbéèrè yìí ni {}.
Àṣàyàn {} ni ìdáhùn tó tọ́.
Idahun to pe ni {}.
Idahun ti o pe ni {}.
Nitori naa, idahun ni {}.
Ìdáhùn tó dára jùlọ ni {}.
Ìdáhùn tó tọ́ ni lẹ́tà {}.
Ìdáhùn: àṣàyàn {}
Ìdáhùn tó tọ̀nà ni {}.
Ìdáhùn tó bá a mu ni {}.
Ìdáhùn: ({})
""",
}

DENIED = {  # the letter is denied, asked, supposed or only discussed
    "en": """
The correct answer is not {}.
The answer isn't {}.
The answer cannot be {}.
Option {} is incorrect.
{} is wrong.
{} is not the correct answer.
Option {} is not correct.
The wrong answer is {}.
I don't think the answer is {}.
It is not true that the answer is {}.
Suppose the answer is {}.
If the answer is {}, we get a contradiction.
Is the answer {}?
The answer is {}?
One might think the answer is {}, but that fails.
The answer {} is wrong.
Many students say the answer is {}.
Option {} describes a different process.
{} seems plausible.
We can rule out option {}.
It cannot be option {}.
Neither is option {}.
The answer is definitely not {}.
Answer: not {}
Answer: {} is wrong
Option {} would be correct only if friction vanished.
""",
    "zh": """
答案不是{}。
正确答案不是{}。
选项{}不正确。
选项{}错误。
{}是错误的。
不选{}。
不应选{}。
错误答案是{}。
有人认为答案是{}。
如果答案是{}，则矛盾。
答案是{}吗？
{}不是正确答案。
排除选项{}。
不正确的选项是{}。
故不选{}。
选项{}讨论的是另一个问题。
如果选{}，则矛盾。
并非答案是{}。
""",
    "ja": """
答えは{}ではありません。
正解は{}ではない。
{}は正しくない。
選択肢{}は間違いです。
{}は正解ではありません。
誤った答えは{}です。
もし答えが{}なら矛盾する。
答えは{}でしょうか？
選択肢{}は不正解です。
答えは{}じゃない。
選択肢{}は別の概念を説明している。
選択肢{}が正しいとは言えない。
正解は{}ではなく別のものです。
""",
    "ko": """
정답은 {}가 아닙니다.
답은 {}이 아니다.
{}는 틀렸습니다.
선택지 {}는 옳지 않습니다.
{}가 정답이 아닙니다.
오답은 {}입니다.
잘못된 답은 {}입니다.
만약 정답이 {}라면 모순입니다.
정답은 {}일까요?
선택지 {}는 다른 개념을 설명합니다.
{}는 맞지 않습니다.
""",
    "de": """
Die richtige Antwort ist nicht {}.
Option {} ist falsch.
{} ist nicht richtig.
Antwort {} ist nicht korrekt.
Die falsche Antwort ist {}.
Ist die Antwort {}?
Wenn die Antwort {} ist, folgt ein Widerspruch.
Es kann nicht Option {} sein.
Option {} ist inkorrekt.
Option {} beschreibt etwas anderes.
Die Antwort {} ist falsch.
Die Antwort kann nicht {} sein.
""",
    "fr": """
La bonne réponse n'est pas {}.
L'option {} est incorrecte.
L'option {} est fausse.
{} n'est pas la bonne réponse.
{} est faux.
La mauvaise réponse est {}.
Si la réponse est {}, on obtient une contradiction.
La réponse est-elle {} ?
La réponse est {} ?
L'option {} n'est pas correcte.
L'option {} décrit autre chose.
La réponse {} est incorrecte.
La réponse ne peut pas être {}.
""",
    "es": """
La respuesta correcta no es {}.
La opción {} es incorrecta.
La opción {} no es correcta.
{} no es la respuesta correcta.
{} es incorrecta.
La respuesta incorrecta es {}.
Si la respuesta es {}, hay una contradicción.
¿La respuesta es {}?
No creo que la respuesta sea {}.
La opción {} es falsa.
La opción {} describe otra cosa.
La respuesta no puede ser {}.
""",
    "pt": """
A resposta correta não é {}.
A opção {} está incorreta.
A alternativa {} está errada.
{} não é a resposta correta.
{} está errada.
A resposta errada é {}.
Se a resposta é {}, há uma contradição.
A resposta é {}?
A opção {} não está correta.
A alternativa {} descreve outra coisa.
A resposta não pode ser {}.
""",
    "it": """
La risposta corretta non è {}.
L'opzione {} è sbagliata.
L'opzione {} non è corretta.
{} non è la risposta corretta.
{} è errata.
La risposta sbagliata è {}.
Se la risposta è {}, c'è una contraddizione.
La risposta è {}?
L'opzione {} è errata.
L'opzione {} descrive altro.
La risposta non può essere {}.
""",
    "id": """
Jawabannya bukan {}.
Jawaban yang benar bukan {}.
Opsi {} salah.
Opsi {} tidak benar.
{} bukan jawaban yang benar.
Jawaban yang salah adalah {}.
Jika jawabannya adalah {}, terjadi kontradiksi.
Apakah jawabannya {}?
Pilihan {} kurang tepat.
Opsi {} menjelaskan hal lain.
Jawabannya bukanlah {}.
""",
    "hi": """
सही उत्तर {} नहीं है।
विकल्प {} गलत है।
विकल्प {} सही नहीं है।
{} सही उत्तर नहीं है।
{} गलत है।
गलत उत्तर {} है।
यदि उत्तर {} है, तो विरोधाभास है।
क्या उत्तर {} है?
उत्तर {} नहीं हो सकता।
विकल्प {} किसी और बात का वर्णन करता है।
""",
    "bn": """
সঠিক উত্তর {} নয়।
বিকল্প {} ভুল।
বিকল্প {} সঠিক নয়।
{} সঠিক উত্তর নয়।
{} ভুল।
ভুল উত্তর হল {}।
যদি উত্তর {} হয়, তবে বিরোধ।
উত্তর কি {}?
উত্তর {} হতে পারে না।
বিকল্প {} অন্য কিছু বর্ণনা করে।
""",
    "ar": """
الإجابة الصحيحة ليست {}.
الخيار {} خاطئ.
الخيار {} غير صحيح.
{} ليست الإجابة الصحيحة.
الإجابة ليست {}.
الإجابة الخاطئة هي {}.
إذا كانت الإجابة هي {} فهناك تناقض.
هل الإجابة هي {}؟
لا يمكن أن تكون الإجابة {}.
الخيار {} ليس صحيحا.
الخيار {} يصف شيئا آخر.
""",
    "sw": """
Jibu sahihi si {}.
Jibu sio {}.
Chaguo {} si sahihi.
Chaguo {} sio sahihi.
{} si jibu sahihi.
Jibu lisilo sahihi ni {}.
Ikiwa jibu ni {}, kuna ukinzani.
Je, jibu ni {}?
Chaguo {} linaelezea kitu kingine.
Jibu haliwezi kuwa {}.
""",
    "yo": """
Ìdáhùn tó tọ́ kì í ṣe {}.
Àṣàyàn {} kò tọ́.
{} kì í ṣe ìdáhùn tó tọ́.
Ìdáhùn kì í ṣe {}.
Ṣé ìdáhùn ni {}?
Bí ìdáhùn bá jẹ́ {}, ìtakora wà.
Àṣàyàn {} ṣàlàyé ohun mìíràn.
Ìdáhùn kò lè jẹ́ {}.
""",
}

CORRECTED = {  # {} is denied, C is stated
    "en": """
{} is wrong, so the answer is C.
The answer is not {} but C.
Option {} is tempting. However, the correct answer is C.
The answer is C, not {}.
The answer is C because {} is wrong.
Answer: C||(Option {} would be correct without friction.)
The correct answer is C. Option {} is incorrect.
Option {} is not correct; option C is correct.
If the answer were {}, energy would grow. So the answer is C.
The answer is C rather than {}.
""",
    "zh": """
{}错误，所以答案是C。
答案不是{}，而是C。
答案是C，不是{}。
选项{}不正确，故选C。
答案是C，因为选项{}不正确。
""",
    "ja": """
{}は間違いなので、答えはCです。
答えは{}ではなく、Cです。
答えはCであり、{}ではない。
選択肢{}は正しくない。よって正解はCです。
""",
    "ko": """
{}는 틀렸으므로 정답은 C입니다.
정답은 {}가 아니라 C입니다.
정답은 C이며, {}가 아닙니다.
선택지 {}는 옳지 않습니다. 따라서 정답은 C입니다.
""",
    "de": """
{} ist falsch, also ist die Antwort C.
Die Antwort ist nicht {}, sondern C.
Die Antwort ist C, nicht {}.
Option {} ist falsch. Die richtige Antwort ist C.
Die richtige Antwort ist C. Das widerspricht Antwort {}.
""",
    "fr": """
{} est faux, donc la réponse est C.
La réponse n'est pas {} mais C.
La réponse est C et non {}.
L'option {} est incorrecte. La bonne réponse est donc C.
""",
    "es": """
{} es incorrecta, así que la respuesta es C.
La respuesta no es {} sino C.
La respuesta es C, no {}.
La opción {} es incorrecta. La respuesta correcta es C.
""",
    "pt": """
{} está errada, então a resposta é C.
A resposta não é {}, mas C.
A resposta é C, não {}.
A alternativa {} está incorreta. A resposta correta é C.
""",
    "it": """
{} è errata, quindi la risposta è C.
La risposta non è {} ma C.
La risposta è C, non {}.
L'opzione {} è sbagliata. La risposta corretta è C.
""",
    "id": """
{} salah, jadi jawabannya adalah C.
Jawabannya bukan {} melainkan C.
Jawabannya adalah C, bukan {}.
Opsi {} salah. Jawaban yang benar adalah C.
""",
    "hi": """
{} गलत है, इसलिए सही उत्तर C है।
उत्तर {} नहीं, बल्कि C है।
सही उत्तर C है, {} नहीं।
विकल्प {} गलत है। सही उत्तर C है।
""",
    "bn": """
{} ভুল, তাই সঠিক উত্তর হল C।
উত্তর {} নয়, বরং C।
সঠিক উত্তর হল C, {} নয়।
বিকল্প {} ভুল। সঠিক উত্তর হল C।
""",
    "ar": """
{} خاطئ، لذلك الإجابة هي C.
الإجابة ليست {} بل C.
الإجابة هي C وليست {}.
الخيار {} غير صحيح. الإجابة الصحيحة هي C.
""",
    "sw": """
{} si sahihi, kwa hiyo jibu ni C.
Jibu si {} bali ni C.
Jibu ni C, si {}.
Chaguo {} si sahihi. Jibu sahihi ni C.
""",
    "yo": """
{} kò tọ́, nítorí náà ìdáhùn ni C.
Ìdáhùn kì í ṣe {} bí kò ṣe C.
Ìdáhùn ni C, kì í ṣe {}.
Àṣàyàn {} kò tọ́. Ìdáhùn tó tọ́ ni C.
""",
}

DENIED_TOO = r"""
Die Antwort lautet nicht {}.
Option {} trifft nicht zu.
Option {} ist nicht die richtige Antwort.
Man könnte meinen, die Antwort sei {}.
答案并不是{}。
答案不可能是{}。
正确答案绝不是{}。
选项{}不是正确答案。
选项{}是不正确的。
不能选{}。
选{}是错误的。
{}选项错误。
{}不对。
正解は{}ではなさそうです。
正解は{}とは限らない。
{}が正解とは言えません。
答えが{}だとすると矛盾する。
答えは{}だと思われがちだが違う。
정답이 {}라고 생각할 수 있지만 틀렸습니다.
정답은 {}일 수 없습니다.
{}번은 오답입니다.
정답이 {}라면 모순이다.
La réponse n'est certainement pas {}.
La réponse {} est fausse.
On pourrait croire que la réponse est {}.
La bonne réponse ne saurait être {}.
{} n'est pas correct.
La respuesta nunca es {}.
La respuesta {} es incorrecta.
Podría pensarse que la respuesta es {}.
La opción {} no es la respuesta correcta.
{} no es correcta.
A resposta nunca é {}.
A resposta {} está errada.
{} não é correta.
A alternativa {} não é a resposta correta.
La risposta {} è sbagliata.
{} non è corretta.
L'opzione {} non è la risposta corretta.
Si potrebbe pensare che la risposta sia {}.
Jawaban {} salah.
{} tidak benar.
Opsi {} bukan jawaban yang benar.
Jawabannya tidak mungkin {}.
{} सही नहीं है।
उत्तर {} गलत है।
विकल्प {} सही उत्तर नहीं है।
सही उत्तर {} नहीं हो सकता।
{} সঠিক নয়।
উত্তর {} ভুল।
বিকল্প {} সঠিক উত্তর নয়।
সঠিক উত্তর {} হতে পারে না।
الإجابة {} خاطئة.
{} غير صحيح.
الخيار {} ليس الإجابة الصحيحة.
قد يظن البعض أن الإجابة هي {}.
Jibu {} si sahihi.
{} si sahihi.
Chaguo {} si jibu sahihi.
Jibu {} ni kosa.
Ìdáhùn {} kò tọ́.
{} kò tọ́.
Àṣàyàn {} kì í ṣe ìdáhùn tó tọ́.
The answer was never {}.
The answer is hardly {}.
The answer is far from {}.
The answer is unlikely to be {}.
It is unlikely that the answer is {}.
Nothing suggests that the answer is {}.
The answer is no longer {}.
The only wrong option is {}.
The least correct option is {}.
The answer is almost {}.
{} is almost correct.
{} is partially correct.
Option {} is nearly correct.
Option {} is never correct.
Option {} is not the answer.
Choosing {} is a mistake.
Do not choose {}.
Don't pick {}.
Never select option {}.
I would not choose {}.
Students who choose {} forget friction.
Option {}: it is wrong.
Rejected: {}
Eliminated: {}
Why is the answer not {}?
"""  # more of them, of all languages

STATED_B = r"""
**Correct answer: B) Paris**
**Answer:** **B**
**Answer: B. Paris**
The correct answer is:||**B) Paris**
The correct answer is **B) Paris**, because A is wrong.
Answer: **B** – Paris
$\boxed{\text{B) Paris}}$
Final Answer: **(B)**
### Answer: **B**
Final answer: $\boxed{B}$
\boxed{B. Paris}
<answer>B</answer>
Therefore, the answer is $\boxed{\textbf{(B)}}$.
The answer is (B) 12.
✅ **Answer: B**
Answer：B
Answer: Option B
Answer: option (B)
Answer: Choice B
Answer: The correct answer is B
**B**
B.
(B)
B) Paris
B: Paris
**B) Paris**
Option B
**Option B**
Option B: Paris
Choice (B)
[B]
\(\boxed{B}\)
B||Because A is wrong.
B) Paris||Explanation: A is wrong since C.
Thus the answer:||B
So the answer would be B.
Hence (B).
Therefore (B)
So B.
Therefore, option B.
This corresponds to option B.
which is option B.
This corresponds to choice (B).
It matches option B.
The only correct one is B.
Only B is correct.
Only option B is correct.
B is the only correct option.
B is the best answer.
Correct: B
Correct option: B
Right answer: B
The correct answer is letter B.
The answer is "B"
The answer is 'B'.
I'll go with B.
I pick B.
Let's choose B.
Select B.
Choose: B
My choice: B
My final answer is B
The option that fits is B.
The best answer among the choices is B.
The answer that best fits is B.
Among the options, B is correct.
A is wrong because x. C is wrong. D is wrong. Therefore the correct answer is B.
A) Wrong.|B) Right.|C) Wrong.|D) Wrong.||Answer: B
A) Wrong.|B) Right.|C) Wrong.||B
- **A**: no|- **B**: yes||**B**
The answer is B, not A.
The answer is B and not C.
The answer is B (not A).
The answer is $\text{B}$
The answer is \[ \boxed{B} \]
The correct answer is||$$\boxed{\mathrm{B}}$$
**Final Answer**|B
**Final Answer**|\boxed{B}
Answer = B
Answer → B
Answer is (b)|Answer: b
The answer, therefore, is B.
The answer is, of course, B.
The answer is clearly (B) because heat rises.
The answer is [B].
Answer: (B)|Confidence: 90%
Explanation: x|Answer: B|Confidence: 80%
\fbox{B}
\boxed {B}
\boxed{(\text{B})}
\boxed{\mathbf{B}}
\boxed{\text{Option B}}
\boxed{\text{Answer: B}}
$\boxed{B}$ is the answer; A is wrong.
The answer is B.||Let me know if you want more detail about A.
Answer: B||A is wrong because it is.
Answer: 𝐁
Answer: Ⓑ
Answer: Ｂ
The answer is *B*
The answer is _B_.
Answer: B\
The correct answer is **Option B**.
The correct answer is option **B: Paris**.
Hence, B is the correct option.
B is correct
It's B.
The answer is: (B) $x^2$
Answer: B) $x^2$
So the correct answer is option (B): 5 m/s.
The answer is B, since the others fail.
"answer": "B"
{"answer": "B"}
The correct answer is therefore **B**: Paris
### Explanation|A is wrong.||### Answer|**B**
**Explanation:** …||**Correct Answer: B**
**选项分析**：|A. 错误。|B. 正确。|C. 错误。||因此，正确答案是 **B**。
A. 不正确。B. 正确。||**答案：B**
### 答案|B
正确答案：**B. 北京**
答案是 **B) 北京**
**正确答案是：B**
所以，答案是（B）北京。
正解は **B** です。
**正解：B**
**答え：B) 東京**
### 答え|**B**
**정답: B**
### 정답: B
정답은 **B) 서울**입니다.
정답은 **B**입니다.
**Antwort: B**
**Richtige Antwort: B) Berlin**
Die richtige Antwort ist **B) Berlin**.
Die richtige Antwort ist: **B**
### Antwort|B
**Réponse : B**
La bonne réponse est **B) Paris**.
**La bonne réponse est B.**
Réponse finale : **B**
**Respuesta: B**
La respuesta correcta es **B) Madrid**.
**Respuesta correcta: B**
A resposta correta é **B) Lisboa**.
**Resposta: B**
La risposta corretta è **B) Roma**.
**Risposta: B**
Jawaban yang benar adalah **B) Jakarta**.
**Jawaban: B**
सही उत्तर **B) दिल्ली** है।
**उत्तर: B**
सही उत्तर है **B**।
সঠিক উত্তর হল **B) ঢাকা**।
**উত্তর: B**
الإجابة الصحيحة هي **B) القاهرة**.
**الإجابة: B**
الإجابة الصحيحة هي **(B)**.
Jibu sahihi ni **B) Nairobi**.
**Jibu: B**
Ìdáhùn tó tọ́ ni **B) Èkó**.
**Ìdáhùn: B**
The correct answer is **B**.||- **A** is incorrect because x.|- **C** is incorrect because y.|- **D** is incorrect because z.
Answer: B||Explanation: Option A is not correct. Option C is not the answer.
Let's evaluate:||A) True|B) False|C) True|D) True||The false one is B.||Answer: B
Option A: plausible.|Option B: best.|Option C: no.||Therefore, the correct answer is **Option B**.
Die Antwort ist **B**, da A falsch ist.
答案是B，因为A错误。
正解はB（東京）です。
答えはB. 東京です。
정답은 B. 서울입니다.
정답은 B(서울)입니다.
La respuesta es B porque A es falsa.
La respuesta es B porque C es falsa.
A resposta é B, pois A está errada.
La risposta è B perché A è errata.
Jawabannya B karena A salah.
सही उत्तर B है क्योंकि A गलत है।
সঠিক উত্তর B, কারণ A ভুল।
الإجابة هي B لأن A خاطئ.
Jibu ni B kwa sababu A si sahihi.
Answer: B.
Answer: **B**.
Answer:B
answer: B
ANSWER - (B)
The answer is B。
答案:B
答案：(B)
答案：「B」
答案： B。
正解: (B)
정답:B
Antwort:B
Respuesta:B
Réponse:B
RÉPONSE : B
RESPOSTA: B
RISPOSTA: B
JAWABAN: B
JIBU: B
ÌDÁHÙN: B
Ìdáhùn: B
الإجابة: ب
الإجابة الصحيحة هي ب.
الإجابة الصحيحة هي (ب)
সঠিক উত্তর হল ব।
উত্তর: ব
"""  # whole texts that answer B

UNSTATED = r"""
The answer is B-cells.
The answer is Berlin
Vitamin B is important. Vitamin B is correct.
The answer is A/B testing
Options A and B are both correct.
Both A and C are correct.
Neither A nor B is correct.
A or option B is correct.
It could be A. It could be B.
The choice between A and B is hard.
A: because|B: because
The answer is C++.
The answer is A*B.
\boxed{A+B}
\boxed{AB}
\boxed{A \text{ or } B}
\boxed{A, B}
The answer is AB.
Answer: A and B
Answer: A, B, C
Answer: A / B
Answer: A, and B
Answer: A & B
Answer: (A) or (B)
The answer is A. or B.
The answer is either A or B.
The answer is A or possibly B.
Answer: A (or B)
None of the options.
Answer: None
Answer: I
I think, therefore I am.
A good answer is a short one.
The answer is a good one.
As for D, see C.
The answer is 5.
Plan B is correct.
The answer is point B's image
Statement A is correct, statement B is wrong.
Consider option A.
Let's look at option B
The answer is difficult: A says yes, B says no.
What is the answer? A?
The answer is A? No.
The answer is B? Hmm, I am not sure.
I doubt that the answer is B.
I am not sure the answer is B.
You might think the answer is B.
The incorrect answer is B.
Incorrect answer: B
Wrong answer: B
Not B.
not option B
Excluding option B
The answer cannot be option B.
Answer: not (B)
The answer is anything but B.
The answer is neither A nor B.
answer choices: A, B, C, D
Answer choices:|A. x|B. y
Answer options: A) x B) y
The options are A, B, C and D.
The answer depends on A.
The correct answer depends on B.
Select A or B.
If B is correct, then A.
If option B is correct, then entropy falls.
Assuming B is the answer leads nowhere.
Is B correct?
Is option B correct?
Could B be the correct answer?
B would be the correct answer if n were even.
Option B would be correct if n were even.
It is false that B is correct.
It is not the case that option B is correct.
Nobody says that B is correct.
The claim that the answer is B is wrong.
I first thought the answer was B, but it is not.
A. wrong|B. right
A) 错误|B) 正确
答案：A、B
答案：A和B
答案是A或B
Antwort: A oder B
Die Antwort ist A oder B.
La réponse est A ou B.
Answer: A, B
Answer: A; B
Answer: A B
Answer: AB
정답: A, B
정답은 A와 B입니다
正解はAとBです
Answer: A or B
Answer: both A and B
Options: A B C D
\boxed{\text{A or B}}
\boxed{A/B}
\boxed{\text{None}}
\boxed{E}
Answer: E
Answer: 5
答案：E
The answer is not A. The answer is not B.
A is wrong. B is wrong.
A不对，B也不对。
AもBも正しくない。
A와 B는 틀렸다.
Weder A noch B ist richtig.
Ni A ni B est correct.
Ni A ni B es correcta.
Nem A nem B está correta.
Né A né B è corretta.
Baik A maupun B salah.
न A सही है, न B।
A বা B কোনোটিই সঠিক নয়।
لا A ولا B صحيح.
Wala A wala B si sahihi.
The answer A is incorrect, and so is B.
I am torn between A and B.
It is either A or B.
Could be A, could be B.
The answer is A... or maybe B.
The answer is A, no, B or C.
"""  # whole texts that answer nothing

EITHER = {
    "en": "or and",
    "zh": "或 和",
    "ja": "または と",
    "ko": "또는 와",
    "de": "oder und",
    "fr": "ou et",
    "es": "o y",
    "pt": "ou e",
    "it": "o e",
    "id": "atau dan",
    "hi": "या और",
    "bn": "বা এবং",
    "ar": "أو و",
    "sw": "au na",
    "yo": "tàbí àti",
}
