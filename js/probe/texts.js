// The probe's own sentences.

import { said } from "../shared/said.js";
import { textsOf } from "../shared/texts.js";

/** The sentence of that name. */
export const text = textsOf("zImageVramProbe");

/** A text of a record in the page's language. */
export const textIn = (record, english) => said(english, record.words, text);
