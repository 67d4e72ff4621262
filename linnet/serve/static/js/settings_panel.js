// The panel of settings: sampling, system prompt, tools, API key.

import { byId } from "./dom.js";
import { DEFAULT_SAMPLING, loadApiKey, SAMPLING, saveApiKey, saveSettings } from "./settings.js";
import { EXAMPLE_TOOLS, parseTools, ToolsError, withTools } from "./tools.js";

export class SettingsPanel {
  #settings;
  #onChange;
  #onKey;
  #tools = byId("tools");
  #system = byId("system");

  /**
   * @param {import("./settings.js").Settings} settings is changed as the reader types
   * @param {() => void} onChange
   * @param {() => void} onKey is called when there is another API key
   */
  constructor(settings, onChange, onKey) {
    this.#settings = settings;
    this.#onChange = onChange;
    this.#onKey = onKey;
    for (const name of SAMPLING) this.#bindSampling(name);
    this.#bindText(this.#system, "system");
    this.#bindText(this.#tools, "tools");
    this.#bindKey();
    byId("example-tools").addEventListener("click", () => this.addTools(EXAMPLE_TOOLS));
    byId("reset-sampling").addEventListener("click", () => this.#resetSampling());
    this.#checkTools();
  }

  /** Defines tools besides those that are there. */
  addTools(tools) {
    this.#tools.value = withTools(this.#tools.value, tools);
    this.#tools.dispatchEvent(new Event("input"));
  }

  focusKey() {
    byId("api-key").focus();
  }

  focusTools() {
    this.#tools.focus();
  }

  #bindSampling(name) {
    const number = byId(name);
    const slider = document.querySelector(`input[type="range"][data-of="${name}"]`);
    const showSlider = () => {
      if (!slider) return;
      slider.value = number.value === "" ? slider.defaultValue : number.value;
      slider.classList.toggle("unset", number.value === "");
    };
    number.value = this.#settings.sampling[name];
    showSlider();
    number.addEventListener("input", () => {
      // What is out of range is not sent; the box shows that it is.
      this.#settings.sampling[name] = number.validity.valid ? number.value : "";
      showSlider();
      this.#changed();
    });
    slider?.addEventListener("input", () => {
      number.value = slider.value;
      number.dispatchEvent(new Event("input"));
    });
  }

  #resetSampling() {
    for (const name of SAMPLING) {
      byId(name).value = DEFAULT_SAMPLING[name];
      byId(name).dispatchEvent(new Event("input"));
    }
  }

  #bindText(area, name) {
    area.value = this.#settings[name];
    area.addEventListener("input", () => {
      this.#settings[name] = area.value;
      if (area === this.#tools) this.#checkTools();
      this.#changed();
    });
  }

  #checkTools() {
    const problem = byId("tools-problem");
    problem.textContent = "";
    try {
      parseTools(this.#tools.value);
    } catch (error) {
      if (!(error instanceof ToolsError)) throw error;
      problem.textContent = error.message;
    }
    this.#tools.setAttribute("aria-invalid", String(Boolean(problem.textContent)));
  }

  #bindKey() {
    const key = byId("api-key");
    key.value = loadApiKey();
    key.addEventListener("change", () => {
      saveApiKey(key.value.trim());
      this.#onKey();
    });
  }

  #changed() {
    saveSettings(this.#settings);
    this.#onChange();
  }
}
