// Texts that the server sends, in the page's language. No page is needed here.

/** A text as the page says it: the server's own English where there are no words for it.
 *
 * @param words by the English text, key and values of a sentence, as nodes/words.py gives them; a
 *   list in place of a value is another sentence. Records of older versions have none.
 * @param text gives the sentence of a name, see texts.js.
 */
export function said(english, words, text) {
  const sentence = ([key, ...values]) => text(key, ...values.map(inner));
  const inner = (value) => (Array.isArray(value) ? sentence(value) : value);
  return words && Object.hasOwn(words, english) ? sentence(words[english]) : english;
}
