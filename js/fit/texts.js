// Fit to VRAM's own sentences.

import { textsOf } from "../shared/texts.js";

/** The sentence of that name. */
export const text = textsOf("zImageFitToVram");
