// The slider for how many tokens a model may think.

import { byId } from "./dom.js";
import { brief } from "./format.js";
import { saveSettings } from "./settings.js";

const STEPS = [0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, null];

/** @param {import("./settings.js").Settings} settings is changed by the slider */
export function bindThinkingBudget(settings) {
  const slider = byId("thinking-budget");
  const label = byId("thinking-label");
  slider.max = STEPS.length - 1;
  const place = STEPS.indexOf(settings.thinking);
  slider.value = place < 0 ? STEPS.length - 1 : place;
  const show = () => {
    const budget = STEPS[slider.value];
    label.textContent = budget === null ? "free" : budget === 0 ? "off" : brief(budget);
    const spoken = budget === null ? "no limit" : `${budget} tokens`;
    slider.setAttribute("aria-valuetext", spoken);
    slider.title = `Thinking: ${spoken}`;
  };
  slider.addEventListener("input", () => {
    settings.thinking = STEPS[slider.value];
    saveSettings(settings);
    show();
  });
  show();
}
