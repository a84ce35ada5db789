// Fit to VRAM's own sentences.

import { said } from "../shared/said.js";
import { textsOf } from "../shared/texts.js";

/** The sentence of that name. */
export const text = textsOf("zImageFitToVram");

/** A text of the server's answer in the page's language. */
export const textIn = (answer, english) => said(english, answer.words, text);
