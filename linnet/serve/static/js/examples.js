// Things that a very small model can do, to begin a chat with.

import { EXAMPLE_TOOLS } from "./tools.js";

/**
 * @typedef {object} Example
 * @property {string} icon
 * @property {string} title
 * @property {string} about
 * @property {string} prompt
 * @property {() => { name: string, text: string }} [file] to send along
 * @property {object[]} [tools] to define before
 */

const PEOPLE = ["baker", "captain", "gardener", "painter", "pilot", "sailor", "teacher", "tailor"];
const PLACES = ["attic", "garden", "harbor", "library", "market", "mill", "museum", "station"];
const THINGS = ["basket", "bell", "clock", "kettle", "ladder", "letter", "mirror", "violin"];
const KINDS = ["blue", "copper", "dusty", "narrow", "old", "quiet", "round", "silver"];
const NUM_LINES = 120;

/** @type {Example[]} */
export const EXAMPLES = [
  {
    icon: "search",
    title: "Recall a fact",
    about: "from anywhere in a long text",
    prompt: "What is the secret code of the amber lantern?",
    file: () => ({ name: "notes.txt", text: textWith(fact()) }),
  },
  {
    icon: "file",
    title: "Find a definition",
    about: "in a Python file",
    prompt: "Where is open_violin defined?",
    file: () => ({ name: "main.py", text: codeWith("def open_violin(sailor, harbor):") }),
  },
  {
    icon: "copy",
    title: "Copy a text",
    about: "word by word",
    prompt:
      "Repeat this text exactly:\n\n" +
      "The sailor hides the copper key. In the harbor there is a silver bell.",
  },
  {
    icon: "tool",
    title: "Call a tool",
    about: "and use its result",
    prompt: "What is the weather in Oslo?",
    tools: EXAMPLE_TOOLS,
  },
  {
    icon: "thought",
    title: "Do a sum",
    about: "in a think span",
    prompt: "What is 47 + 38?",
  },
  {
    icon: "chat",
    title: "Ask what it is",
    about: "and what it can do",
    prompt: "What can you do?",
  },
];

function fact() {
  return `The secret code of the amber lantern is ${10_000 + Math.floor(Math.random() * 90_000)}.`;
}

/** Functions that do little, and among them one. */
function codeWith(definition) {
  const heads = THINGS.flatMap((thing) => [
    `def close_${thing}(${oneOf(PEOPLE)}):`,
    `def find_${thing}(${oneOf(PLACES)}, ${oneOf(KINDS)}=None):`,
    `def move_${thing}(${oneOf(PEOPLE)}, ${oneOf(PLACES)}):`,
  ]);
  heads.splice(Math.floor(Math.random() * heads.length), 0, definition);
  return heads.map((head) => `${head}\n    return ${/\((\w+)/.exec(head)[1]}\n`).join("\n\n");
}

/** A story without a plot, and somewhere in it a sentence. */
function textWith(sentence) {
  const lines = Array.from({ length: NUM_LINES }, () => [story(), story(), story()].join(" "));
  lines.splice(Math.floor(Math.random() * NUM_LINES), 0, sentence);
  return lines.join("\n");
}

function story() {
  const [person, place, thing, kind] = [PEOPLE, PLACES, THINGS, KINDS].map(oneOf);
  return oneOf([
    `The ${person} finds the ${kind} ${thing}.`,
    `In the ${place} there is a ${thing}.`,
    `Then the ${person} walks to the ${place}.`,
    `The ${person} has a ${kind} ${thing}, but nobody knows why.`,
  ]);
}

function oneOf(list) {
  return list[Math.floor(Math.random() * list.length)];
}
