// Tools that a model may call, as the reader defines them: JSON in the shape of the OpenAI API.

/** A definition of tools that is wrong, with a message for the reader. */
export class ToolsError extends Error {}

export const EXAMPLE_TOOLS = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Current weather of a city.",
      parameters: {
        type: "object",
        properties: { city: { type: "string" } },
        required: ["city"],
      },
    },
  },
];

/**
 * @param {string} text a JSON array of tools, or one tool; a bare function description is wrapped
 * @returns {object[]}
 * @throws {ToolsError}
 */
export function parseTools(text) {
  if (!text.trim()) return [];
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new ToolsError(`The tools are not JSON: ${error.message}`);
  }
  return (Array.isArray(value) ? value : [value]).map(toTool);
}

function toTool(value, place) {
  const tool = value?.function ? value : { type: "function", function: value };
  const { name, parameters } = tool.function ?? {};
  if (typeof name !== "string" || !name) throw new ToolsError(`Tool ${place + 1} has no name.`);
  if (parameters !== undefined && (typeof parameters !== "object" || !parameters)) {
    throw new ToolsError(`The parameters of ${name} are not a JSON schema.`);
  }
  return tool;
}

/** Adds tools to a definition, in place of those that have the same names. */
export function withTools(text, added) {
  let present = [];
  try {
    present = parseTools(text);
  } catch {
    // What cannot be read is replaced.
  }
  const names = new Set(added.map((tool) => tool.function.name));
  const kept = present.filter((tool) => !names.has(tool.function.name));
  return JSON.stringify([...kept, ...added], null, 2);
}

/** Pretty-prints JSON; text that is not JSON, or not yet, stays as it is. */
export function prettyJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
