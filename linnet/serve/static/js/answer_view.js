// One answer on the page.

import { BranchSwitch, statsOf } from "./answer_footer.js";
import { copyText, h, iconButton } from "./dom.js";
import { ErrorBox } from "./error_box.js";
import { MarkdownView } from "./markdown_view.js";
import { paced } from "./pace.js";
import { PrefillView } from "./prefill_view.js";
import { ThinkingView } from "./thinking_view.js";
import { ToolCallsView } from "./tool_calls_view.js";

/**
 * @typedef {object} AnswerActions
 * @property {() => void} regenerate
 * @property {(results: string[]) => void} sendResults
 * @property {(step: -1 | 1) => void} step to another alternative of the answer
 * @property {(step: -1 | 1) => void} stepResults to other results of its tool calls
 * @property {() => void} onDrawn is called after each change of the page
 */
export class AnswerView {
  #turn;
  #results = [];
  #onDrawn;
  #prefill = new PrefillView();
  #thinking = new ThinkingView();
  #body = h("div.markdown");
  #markdown = new MarkdownView(this.#body);
  #calls;
  #error;
  #stats = h("span.stats");
  #tools;
  #copy;
  #branches;
  #resultBranches;
  #pace = paced(() => this.#draw());

  /**
   * @param {import("./chat_tree.js").Turn & import("./answer.js").Answer} turn
   * @param {AnswerActions} actions
   */
  constructor(turn, actions) {
    this.#turn = turn;
    this.#onDrawn = actions.onDrawn;
    this.#calls = new ToolCallsView(actions.sendResults);
    this.#error = new ErrorBox(actions.regenerate);
    this.#branches = new BranchSwitch(actions.step);
    this.#resultBranches = new BranchSwitch(actions.stepResults);
    this.#calls.element.append(this.#resultBranches.element);
    this.#copy = iconButton("copy", "Copy the answer", ({ currentTarget }) => {
      copyText(currentTarget, turn.text);
    });
    this.#tools = h(
      "div.turn-tools",
      {},
      this.#branches.element,
      this.#copy,
      iconButton("again", "Write another answer", actions.regenerate),
    );
    this.element = h(
      "article.turn.answer",
      { "aria-label": "Answer", "aria-busy": "true" },
      this.#prefill.element,
      this.#thinking.element,
      this.#body,
      this.#calls.element,
      this.#error.element,
      h("footer", {}, this.#tools, this.#stats),
    );
  }

  /**
   * @param {{ place: number, length: number }} branch which alternative this is, of how many
   * @param {string[]} results of the tool calls
   * @param {{ place: number, length: number }} resultBranch
   */
  update(branch, results, resultBranch) {
    this.#results = results;
    this.#branches.show(branch.place, branch.length);
    this.#resultBranches.show(resultBranch.place, resultBranch.length);
    this.#drawAround();
    this.grow();
  }

  /** Shows what the turn has gained since; at the pace of the screen. */
  grow() {
    this.#pace.request();
  }

  remove() {
    this.#pace.stop();
    this.element.remove();
  }

  #draw() {
    const isWhole = this.#turn.state !== "writing";
    this.#drawAround();
    const isDone = this.#markdown.show(this.#turn.text, isWhole);
    this.element.setAttribute("aria-busy", String(!isWhole || !isDone));
    this.#onDrawn();
    return isDone;
  }

  #drawAround() {
    const turn = this.#turn;
    const isWriting = turn.state === "writing";
    this.element.classList.toggle("writing", isWriting);
    this.#prefill.show(turn);
    this.#thinking.show(turn);
    this.#calls.show(turn, this.#results);
    this.#error.show(turn.error);
    this.#tools.hidden = isWriting;
    this.#copy.hidden = !turn.text.trim();
    this.#stats.textContent = statsOf(turn);
  }
}
