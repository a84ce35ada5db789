// The page's own sentences, in the language of the page, from locales/<language>/main.json.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const KEY = "zImageVramProbe";
let byLanguage = {};

/** Asks the host for the sentences of all languages, once. */
export async function loadTexts() {
  byLanguage = await api.getCustomNodesI18n();
}

/** The sentence of that name with $1, $2, ... replaced. */
export function text(name, ...values) {
  const locale = app.extensionManager.setting.get("Comfy.Locale") ?? "en";
  const languages = [locale, locale.split("-")[0], "en"];
  const found = languages.map((language) => byLanguage[language]?.[KEY]?.[name]).find(Boolean);
  return (found ?? name).replace(/\$(\d)/g, (_, index) => values[index - 1] ?? "");
}
