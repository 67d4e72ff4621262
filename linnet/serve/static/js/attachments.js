// The files that go with the next message, each with its count of tokens.

import { h, icon, iconButton } from "./dom.js";
import { droppedFiles, pack, withHeader } from "./files.js";
import { plural } from "./format.js";

const CHARACTERS_PER_TOKEN = 4; // roughly, until the server has counted

export class Attachments {
  /** @type {import("./chat_tree.js").Attachment[]} */
  #files = [];
  #element;
  #countTokens;
  #onChange;
  #onProblem;

  /**
   * @param {HTMLElement} element that shows them
   * @param {object} actions
   * @param {(text: string) => Promise<number>} actions.countTokens
   * @param {() => void} actions.onChange
   * @param {(message: string) => void} actions.onProblem
   */
  constructor(element, { countTokens, onChange, onProblem }) {
    this.#element = element;
    this.#countTokens = countTokens;
    this.#onChange = onChange;
    this.#onProblem = onProblem;
  }

  get isEmpty() {
    return this.#files.length === 0;
  }

  /** Tokens of all files, estimated for those that the server has not counted yet. */
  get tokens() {
    return this.#files.reduce((sum, file) => sum + tokensOf(file), 0);
  }

  get list() {
    return this.#files;
  }

  clear() {
    this.#files = [];
    this.#show();
  }

  /** Takes text in as a file. */
  addText(name, text) {
    this.#add({ name, text: withHeader(name, text), tokens: null });
  }

  /** @param {DataTransfer} transfer of a drop */
  async addDropped(transfer) {
    await this.addFound(() => droppedFiles(transfer));
  }

  /** @param {() => Promise<import("./files.js").Found[]>} find */
  async addFound(find) {
    this.#element.setAttribute("aria-busy", "true");
    try {
      for (const { name, text, skipped } of await pack(await find())) {
        if (skipped) {
          this.#onProblem(`${name}: ${plural(skipped, "file")} left out, not text`);
        }
        if (text) this.#add({ name, text, tokens: null });
      }
    } catch (error) {
      this.#onProblem(error.message);
    }
    this.#element.removeAttribute("aria-busy");
  }

  async #add(file) {
    this.#files.push(file);
    this.#show();
    file.tokens = await this.#countTokens(file.text).catch(() => null);
    this.#show();
  }

  #remove(file) {
    this.#files = this.#files.filter((other) => other !== file);
    this.#show();
  }

  #show() {
    this.#element.replaceChildren(
      ...this.#files.map((file) =>
        h(
          "div.chip",
          {},
          icon("file"),
          h("span.file-name", { title: file.name }, file.name),
          h("span.file-size", {}, sizeOf(file)),
          iconButton("close", `Remove ${file.name}`, () => this.#remove(file)),
        ),
      ),
    );
    this.#element.hidden = this.isEmpty;
    this.#onChange();
  }
}

function sizeOf(file) {
  const tokens = plural(tokensOf(file), "token");
  return file.tokens === null ? `≈ ${tokens}` : tokens;
}

function tokensOf({ text, tokens }) {
  return tokens ?? Math.ceil(text.length / CHARACTERS_PER_TOKEN);
}
