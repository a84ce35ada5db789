// The page's own sentences, in the language of the page, from locales/<language>/main.json.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

let byLanguage = {};
let asked = null;

/** Asks the host for the sentences of all languages, once. */
export function loadTexts() {
  asked ??= api.getCustomNodesI18n().then((texts) => (byLanguage = texts));
  return asked;
}

/** Gives a function for the sentences below that key: name -> sentence, $1, $2, ... replaced. */
export function textsOf(key) {
  return (name, ...values) => {
    const locale = app.extensionManager.setting.get("Comfy.Locale") ?? "en";
    const languages = [locale, locale.split("-")[0], "en"];
    const found = languages.map((language) => byLanguage[language]?.[key]?.[name]).find(Boolean);
    return (found ?? name).replace(/\$(\d)/g, (_, index) => values[index - 1] ?? "");
  };
}
