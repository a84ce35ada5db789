// What matters of a plan, in two sentences. No page is needed here.

import { highest } from "./bars.js";
import { bytesText, roughText, shortText } from "../shared/bytes.js";

/** Says whether the plan fits, and what its steps stream.
 *
 * @param plan as the server gives it; plans of older versions lack some keys.
 * @param text gives the sentence of a name, see shared/texts.js.
 * @returns {{verdict: string, streamed: string}} `streamed` is empty where nothing would run.
 */
export function headlineOf(plan, text) {
  return { verdict: verdictOf(plan, text), streamed: streamedOf(plan, text) };
}

function verdictOf({ verdict, budget_bytes: budget, missing_bytes: missing, ...plan }, text) {
  if (budget === null) {
    const { name, peak } = highest(plan.stages);
    return text("noLimit", bytesText(peak), text(name));
  }
  // A budget of 0 is what the card has free; so is one that is larger than that.
  const isFree = plan.named_bytes !== undefined && plan.named_bytes !== budget;
  const room = isFree ? text("free", shortText(budget)) : shortText(budget);
  return text(verdict, room, bytesText(missing));
}

function streamedOf({ verdict, stages, ...plan }, text) {
  if (verdict === "too large") return "";
  if (plan.budget_bytes === null) return text("setBudget");
  const streamed = Math.max(...stages.map((stage) => stage.streamed));
  if (streamed === 0) return text("resident");
  const { copy_seconds: copied, wait_seconds: waited } = plan;
  if (copied === undefined) return text("streamed", roughText(streamed));
  const [about, wait] = [copied, waited].map(secondsText);
  return text(waited ? "streamedWaits" : "streamedHidden", roughText(streamed), about, wait);
}

/** Such as "0.2 s" or "12 s"; at least "0.01 s". */
function secondsText(seconds) {
  const digits = seconds < 0.095 ? 2 : seconds < 9.95 ? 1 : 0;
  return `${Math.max(0.01, seconds).toFixed(digits)} s`;
}
