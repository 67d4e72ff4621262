// Where the reader writes: the text box, its files, the meter and the button that sends or stops.

import { Attachments } from "./attachments.js";
import { ContextMeter } from "./context_meter.js";
import { byId, setIcon } from "./dom.js";
import { chosenFiles } from "./files.js";

const MAX_HEIGHT_PX = 240;
const PASTE_LEN = 8_000; // characters from which pasted text becomes a file
const COUNT_AFTER_MS = 350;

/**
 * @typedef {object} ComposerActions
 * @property {(text: string, attachments: import("./chat_tree.js").Attachment[]) => boolean} send
 *   returns whether it could be sent
 * @property {() => void} stop
 * @property {() => boolean} editLast opens the last message for editing, if there is one
 * @property {(text: string, signal?: AbortSignal) => Promise<number>} countTokens
 * @property {(message: string) => void} onProblem
 */
export class Composer {
  #box = byId("message");
  #button = byId("send");
  #meter = new ContextMeter(byId("meter"));
  #attachments;
  #actions;
  #isRunning = false;
  #draftTokens = 0;
  #context = { past: 0, limit: undefined };
  #counting = { timer: 0, controller: new AbortController() };

  /** @param {ComposerActions} actions */
  constructor(actions) {
    this.#actions = actions;
    this.#attachments = new Attachments(byId("attachments"), {
      countTokens: actions.countTokens,
      onChange: () => this.#refresh(),
      onProblem: actions.onProblem,
    });
    this.#listenToBox();
    this.#listenToFiles();
    this.#fit();
  }

  /** @param {boolean} isRunning whether an answer is being written, which the button then stops */
  setRunning(isRunning) {
    this.#isRunning = isRunning;
    this.#refresh();
  }

  /** @param {{ past: number, limit: number | undefined }} context in tokens */
  setContext(context) {
    this.#context = context;
    this.#refresh();
  }

  /** Puts a text, and maybe a file, into the box for the reader to send. */
  fill(text, file) {
    this.#attachments.clear();
    if (file) this.#attachments.addText(file.name, file.text);
    this.#box.value = text;
    this.#changed();
    this.focus();
  }

  focus() {
    this.#box.focus();
  }

  #listenToBox() {
    this.#box.addEventListener("input", () => this.#changed());
    this.#box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !hasTouchKeyboard()) {
        event.preventDefault();
        if (!this.#isRunning) this.#send();
      } else if (event.key === "ArrowUp" && !this.#box.value && this.#attachments.isEmpty) {
        if (!this.#isRunning && this.#actions.editLast()) event.preventDefault();
      }
    });
    this.#box.addEventListener("paste", (event) => {
      const text = event.clipboardData.getData("text/plain");
      if (text.length < PASTE_LEN && !event.clipboardData.files.length) return;
      event.preventDefault();
      if (text) this.#attachments.addText("pasted text", text);
      else this.#attachments.addDropped(event.clipboardData);
    });
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#isRunning) this.#actions.stop();
      else this.#send();
    });
  }

  #listenToFiles() {
    for (const [button, picker] of [["add-files", "pick-files"], ["add-folder", "pick-folder"]]) {
      byId(button).addEventListener("click", () => byId(picker).click());
      byId(picker).addEventListener("change", ({ target }) => {
        const files = chosenFiles(target.files);
        target.value = "";
        this.#attachments.addFound(async () => files);
      });
    }
    let depth = 0; // dragenter and dragleave come for every element below the pointer
    const show = (change) => {
      depth = Math.max(0, depth + change);
      byId("drop").hidden = depth === 0;
    };
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragenter", (event) => hasFiles(event) && show(1));
    addEventListener("dragleave", (event) => hasFiles(event) && show(-1));
    addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      show(-depth);
      this.#attachments.addDropped(event.dataTransfer);
      this.focus();
    });
  }

  #send() {
    const text = this.#box.value.trim();
    if (!text && this.#attachments.isEmpty) return;
    if (!this.#actions.send(text, this.#attachments.list)) return;
    const next = this.#draftTokens + this.#attachments.tokens;
    this.#context = { ...this.#context, past: this.#context.past + next };
    this.#box.value = "";
    this.#draftTokens = 0;
    this.#attachments.clear();
    this.#changed();
  }

  #changed() {
    this.#fit();
    this.#refresh();
    this.#countLater();
  }

  #countLater() {
    clearTimeout(this.#counting.timer);
    this.#counting.controller.abort();
    const controller = new AbortController();
    this.#counting.controller = controller;
    this.#counting.timer = setTimeout(async () => {
      const text = this.#box.value.trim();
      try {
        this.#draftTokens = text ? await this.#actions.countTokens(text, controller.signal) : 0;
        this.#refresh();
      } catch {
        // The meter keeps what it showed; a server that is gone is said elsewhere.
      }
    }, COUNT_AFTER_MS);
  }

  #fit() {
    this.#box.style.height = "auto";
    this.#box.style.height = `${Math.min(this.#box.scrollHeight, MAX_HEIGHT_PX)}px`;
  }

  #refresh() {
    const isEmpty = !this.#box.value.trim() && this.#attachments.isEmpty;
    const label = this.#isRunning ? "Stop" : "Send";
    setIcon(this.#button, this.#isRunning ? "stop" : "send");
    this.#button.title = label;
    this.#button.setAttribute("aria-label", label);
    this.#button.disabled = isEmpty && !this.#isRunning;
    this.#button.classList.toggle("stop", this.#isRunning);
    const next = this.#draftTokens + this.#attachments.tokens;
    this.#meter.show({ ...this.#context, next });
  }
}

/** On a touch keyboard, Enter begins a new line; the button sends. */
function hasTouchKeyboard() {
  return matchMedia("(hover: none) and (pointer: coarse)").matches;
}
