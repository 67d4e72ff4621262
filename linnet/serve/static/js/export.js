// A chat as a file: Markdown of what is shown, or JSON of all of it.

import { shownTurns } from "./chat_tree.js";
import { h } from "./dom.js";
import { fenceAround } from "./files.js";
import { prettyJson } from "./tools.js";

/** @param {import("./chat_tree.js").Chat} chat */
export function exportMarkdown(chat) {
  const parts = [`# ${chat.title}`];
  if (chat.system) parts.push(`**System**\n\n${chat.system}`);
  parts.push(...shownTurns(chat).map(turnMarkdown));
  save(`${fileName(chat)}.md`, "text/markdown", `${parts.join("\n\n")}\n`);
}

/** @param {import("./chat_tree.js").Chat} chat */
export function exportJson(chat) {
  save(`${fileName(chat)}.json`, "application/json", JSON.stringify(chat, null, 2));
}

function turnMarkdown(turn) {
  if (turn.role === "tool") return `**Result of ${turn.name}**\n\n${fenced(turn.text)}`;
  if (turn.role === "user") {
    const files = (turn.attachments ?? []).map(({ name, tokens }) =>
      tokens === null ? `*${name}*` : `*${name}, ${tokens} tokens*`,
    );
    return ["**You**", ...files, turn.text].filter(Boolean).join("\n\n");
  }
  const parts = [`**${turn.model || "Answer"}**`];
  if (turn.reasoning) {
    const thought = fenced(turn.reasoning.trim());
    parts.push(`<details><summary>Thought</summary>\n\n${thought}\n\n</details>`);
  }
  if (turn.text.trim()) parts.push(turn.text.trim());
  for (const call of turn.calls) {
    parts.push(`Calls \`${call.name}\`\n\n${fenced(prettyJson(call.arguments), "json")}`);
  }
  return parts.join("\n\n");
}

function fenced(text, language = "") {
  const fence = fenceAround(text);
  return `${fence}${language}\n${text}\n${fence}`;
}

function fileName({ title }) {
  return title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50) || "chat";
}

function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
