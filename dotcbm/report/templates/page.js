"use strict";
// The page reads without this. Here: light and dark, keys, sorting, filters, maps, sliders, the grid, and saving the record.
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const text = byId("record").textContent;
  const record = JSON.parse(text);
  const percent = (share) => (100 * share).toFixed(1).replace(/^-(?=0\.0$)/, "").replace("-", "\u2212");
  root.classList.add("js");

  // Details are open for those without a script and in print; else the reader opens them.
  const folded = all("details[data-closed]");
  for (const details of folded) details.open = false;
  let opened = [];
  addEventListener("beforeprint", () => {
    const shut = all("details:not([open])");
    for (const details of shut) details.open = true;
    opened.push(...shut);
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
    opened = [];
  });

  // Light and dark: the system's choice until the button is pressed.
  const themeButton = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const nameTheme = () => {
    themeButton.textContent = isDark() ? "Light" : "Dark";
    themeButton.setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
  };
  const switchTheme = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  };
  themeButton.addEventListener("click", switchTheme);
  system.addEventListener("change", nameTheme);
  nameTheme();

  // Sections: where the reader is, and keys to go elsewhere.
  const sections = all("main > section");
  const links = new Map(all(".contents ol a").map((link) => [link.hash.slice(1), link]));
  const here = () => {
    const atEnd = innerHeight + scrollY >= root.scrollHeight - 2;
    const passed = sections.filter((section) => section.getBoundingClientRect().top < innerHeight * 0.35);
    return atEnd ? sections.length - 1 : Math.max(passed.length - 1, 0);
  };
  let waiting = false;
  const markHere = () => {
    waiting = false;
    const current = sections[here()].id;
    for (const [id, link] of links) {
      if (id === current) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  };
  addEventListener("scroll", () => {
    if (!waiting) requestAnimationFrame(markHere);
    waiting = true;
  }, { passive: true });
  markHere();
  let target = 0;
  const go = (number) => {
    target = Math.min(Math.max(number, 0), sections.length - 1);
    const section = sections[target];
    section.scrollIntoView({ behavior: "instant", block: "start" });
    section.focus({ preventScroll: true });
  };
  const current = () => {
    const focused = sections.findIndex((section) => section.contains(document.activeElement));
    return focused >= 0 ? focused : here();
  };
  const keys = byId("keys");
  addEventListener("keydown", (event) => {
    const inField = event.target.closest && event.target.closest("input, select, textarea");
    if (event.ctrlKey || event.metaKey || event.altKey || inField || !byId("keys-on").checked) return;
    const acts = {
      j: () => go(current() + 1),
      k: () => go(current() - 1),
      t: switchTheme,
      "/": () => byId("concept-filter") && byId("concept-filter").focus(),
      "?": () => {
        keys.open = !keys.open;
        keys.querySelector("summary").focus();
      },
    };
    const act = /^[1-9]$/.test(event.key) ? () => go(Number(event.key) - 1) : acts[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });

  // Tables: each heading is a button; empty values stay at the end.
  const sortValue = (cell) => {
    if (!("v" in cell.dataset)) return cell.textContent.trim().toLowerCase();
    return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  };
  const compare = (a, b, sign) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
  };
  for (const table of all("table.sortable")) {
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const numeric = head.classList.contains("num");
        const was = head.getAttribute("aria-sort");
        const order = was ? (was === "ascending" ? "descending" : "ascending") : numeric ? "descending" : "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", order);
        const rows = [...table.tBodies[0].rows].map((row) => [sortValue(row.cells[column]), row]);
        rows.sort((a, b) => compare(a[0], b[0], order === "ascending" ? 1 : -1));
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }
  const filter = byId("concept-filter");
  if (filter) {
    const rows = [...byId(filter.dataset.filter).tBodies[0].rows];
    const only = document.querySelector("[data-only]");
    const words = new Map(rows.map((row) => [row, [0, 1, 2].map((i) => row.cells[i].textContent).join(" ").toLowerCase()]));
    const sift = () => {
      const wanted = filter.value.trim().toLowerCase();
      let left = 0;
      for (const row of rows) {
        row.hidden = !words.get(row).includes(wanted) || (only.checked && !("shown" in row.dataset));
        left += !row.hidden;
      }
      byId("concept-table-count").textContent = `${left} of ${rows.length} concepts`;
    };
    filter.addEventListener("input", sift);
    only.addEventListener("change", sift);
    sift();
  }

  // Cards: maps and sliders.
  const sigmoid = (logit) => 1 / (1 + Math.exp(-logit));
  for (const article of all("[data-card]")) {
    const [kind, number] = article.dataset.card.split("-");
    const card = record[kind === "errors" ? "errors" : "cards"][Number(number)];
    const onLogit = record.card.head_on === "logit";
    const heat = article.querySelector(".heat");
    const maps = all("button.map", article);
    const gate = article.querySelector(".gate");
    const hide = article.querySelector(".hide-map");
    const sliders = all('input[type="range"]', article);
    const index = (element) => Number(element.closest("tr").dataset.i);
    const details = article.querySelector("details.weigh");
    details.addEventListener("toggle", () => article.classList.toggle("open", details.open));
    article.classList.toggle("open", details.open);
    let on = maps.length ? index(maps[0]) : -1;
    const probability = (i) => {
      const slider = sliders.find((candidate) => index(candidate) === i);
      if (!slider || slider.value === slider.dataset.start) return card.concepts[i].probability;
      return onLogit ? sigmoid(Number(slider.value)) : Number(slider.value);
    };
    const showMap = () => {
      if (!heat) return;
      const gated = gate.getAttribute("aria-pressed") === "true";
      const name = record.concepts[card.concepts[on].concept].name;
      const chosen = maps.find((button) => index(button) === on);
      heat.querySelector("img").src = chosen.querySelector("img").src;
      for (const path of all("path", heat)) path.setAttribute("d", chosen.dataset.outline);
      heat.style.opacity = gated ? probability(on) : 1;
      heat.hidden = hide.getAttribute("aria-pressed") === "true";
      article.querySelector(".map-name").textContent = name;
      article.querySelector(".map-p").textContent = `${percent(probability(on))} %`;
      for (const button of maps) button.setAttribute("aria-pressed", String(index(button) === on));
    };
    for (const button of maps) {
      button.addEventListener("click", () => {
        on = index(button);
        hide.setAttribute("aria-pressed", "false");
        showMap();
      });
    }
    for (const button of [gate, hide]) {
      button.disabled = !heat;
      button.addEventListener("click", () => {
        button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
        showMap();
      });
    }
    const reset = article.querySelector(".reset");
    if (!reset) continue;
    // Inputs round to their step; what they say before they are touched stands for the exact value in the record.
    for (const slider of sliders) slider.dataset.start = slider.value;
    const change = (slider) => {
      if (slider.value === slider.dataset.start) return 0;
      const shown = card.concepts[index(slider)];
      return Number(slider.value) - (onLogit ? shown.logit : shown.probability);
    };
    const classNow = (changed) => {
      const logits = card.class_logits.map((logit, k) =>
        logit + (changed ? sliders.reduce((sum, slider) => sum + change(slider) * card.concepts[index(slider)].slope_K[k], 0) : 0));
      const every = card.rest === null ? logits : [...logits, card.rest];
      const top = Math.max(...every);
      const total = every.reduce((sum, logit) => sum + Math.exp(logit - top), 0);
      return logits.map((logit) => Math.exp(logit - top) / total);
    };
    const before = classNow(false);
    const bars = all(".odds .bar i", article);
    const recompute = () => {
      const now = classNow(true);
      all(".now", article).forEach((cell, k) => {
        cell.textContent = percent(now[k]);
        cell.classList.toggle("changed", percent(now[k]) !== percent(before[k]));
        bars[k].style.width = `${100 * now[k]}%`;
      });
      let moved = 0;
      for (const slider of sliders) {
        const is = change(slider) !== 0;
        moved += is;
        slider.closest("tr").classList.toggle("moved", is);
        const i = index(slider);
        const exact = onLogit ? (is ? Number(slider.value) : card.concepts[i].logit) : probability(i);
        slider.nextElementSibling.textContent = onLogit ? exact.toFixed(2).replace("-", "\u2212") : `${percent(exact)} %`;
      }
      const best = now.indexOf(Math.max(...now));
      const name = record.class_names[card.classes[best]];
      reset.disabled = moved === 0;
      article.querySelector(".said").textContent = moved
        ? `${moved} changed: ${name} ${percent(now[best])} % (was ${percent(before[best])} %)` : "";
      showMap();
    };
    for (const slider of sliders) slider.addEventListener("input", recompute);
    reset.addEventListener("click", () => {
      for (const slider of sliders) slider.value = slider.dataset.start;
      recompute();
      details.querySelector("summary").focus();
    });
    recompute();
  }

  // The grid: sorted by a class's confidence or a concept's probability.
  const list = byId("grid-list");
  if (list) {
    const items = [...list.children];
    const [by, order, show] = ["grid-sort", "grid-order", "grid-show"].map(byId);
    const columns = record.pictures;
    const value = (row) => {
      if (by.value === "confidence") return columns.confidence[row];
      if (by.value === "true") return columns.true_probability[row];
      return columns.concept_probability[row][Number(by.value)];
    };
    const arrange = () => {
      const sign = order.value === "up" ? 1 : -1;
      const rows = items.map((item) => [value(Number(item.dataset.row)), item]);
      rows.sort((a, b) => sign * (a[0] - b[0]));
      let left = 0;
      for (const [score, item] of rows) {
        item.hidden = show.value !== "all" && !item.classList.contains(`is-${show.value}`);
        left += !item.hidden;
        item.querySelector(".score").textContent = `${percent(score)} %`;
      }
      list.append(...rows.map(([, item]) => item));
      byId("grid-count").textContent = `${left} of ${items.length} shown`;
    };
    for (const control of [by, order, show]) control.addEventListener("change", arrange);
    arrange();
  }

  // The record holds references where the page has images: put back, it is the file that the audit wrote, byte for byte.
  byId("save").addEventListener("click", () => {
    const whole = text.replace(/"image":"@((?:errors|cards|grid|experts)-\d+)"/g, (_, id) => `"image":"${byId(id).src.split(",")[1]}"`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([whole], { type: "application/json" }));
    link.download = "audit.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
})();
