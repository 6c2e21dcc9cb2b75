"use strict";
// Draws the page's figures with plotly.js, keeps them in the colours of the page, and runs the controls beside them.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures");
  const colours = read("colours"); // light -> dark
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  // The buttons are named, because by itself plotly.js has one that sends the figure to its maker.
  const buttons = [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]];
  const config = { responsive: true, displaylogo: false, modeBarButtons: buttons, showSendToCloud: false, plotlyServerURL: "" };

  function coloured(value) {
    if (typeof value === "string") return (dark.matches && colours[value]) || value;
    if (Array.isArray(value)) return value.map(coloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, key === "customdata" ? inner : coloured(inner)]));
  }

  function draw(id) {
    const place = document.getElementById(id);
    const layout = coloured(figures[id].layout);
    layout.uirevision = "kept"; // zoom and what the legend hides outlive a redrawing
    if (narrow.matches) layout.font.size = 11;
    return Plotly.react(place, coloured(figures[id].data), layout, { ...config, displayModeBar: narrow.matches ? false : "hover" });
  }

  const drawAll = () => Object.keys(figures).forEach(draw);
  drawAll();
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);

  // Which cost the candidates are shown against, and which of them.
  const cost = document.getElementById("cost");
  const onTarget = document.getElementById("on-target");
  function filterCandidates() {
    const { data, layout } = figures.candidates;
    for (const trace of data) {
      trace.visible = trace.meta.cost === cost.value && !(onTarget.checked && trace.meta.kind === "way");
    }
    layout.xaxis.title.text = `share of the original: ${cost.value}`;
    layout.xaxis.autorange = layout.yaxis.autorange = true;
    draw("candidates");
  }
  if (cost) {
    cost.addEventListener("change", filterCandidates);
    onTarget.addEventListener("change", filterCandidates);
  }

  // Names to look for: marks that do not match fade, rows of the tables that do not are hidden.
  const find = document.getElementById("find");
  const prunable = document.getElementById("prunable");
  const told = document.getElementById("found");
  function filterCoupling() {
    const wanted = find.value.trim().toLowerCase();
    let hits = 0;
    let all = 0;
    for (const trace of figures.coupling.data) {
      if (!trace.customdata) {
        trace.opacity = wanted || prunable.checked ? 0.25 : 1;
        continue;
      }
      trace.marker.opacity = trace.customdata.map(([layer, group, free]) => {
        const hit = (layer.toLowerCase().includes(wanted) || group.toLowerCase().includes(wanted)) && (free || !prunable.checked);
        hits += hit;
        all += 1;
        return hit ? 1 : 0.1;
      });
    }
    draw("coupling");
    for (const row of document.querySelectorAll("[data-find]")) {
      row.hidden = !row.dataset.find.toLowerCase().includes(wanted) || (prunable.checked && row.dataset.free === "no");
    }
    told.textContent = wanted || prunable.checked ? `${hits} of ${all} marks shown` : "";
  }
  if (find) {
    find.addEventListener("input", filterCoupling);
    prunable.addEventListener("change", filterCoupling);
  }

  // Zooming without a mouse: buttons, and the keys + - 0 and the arrows while a figure has the focus.
  function move(id, scale, right, down) {
    const place = document.getElementById(id);
    const change = {};
    for (const [name, step] of [["xaxis", right], ["yaxis", down]]) {
      const [from, to] = place._fullLayout[name].range;
      const middle = (from + to) / 2 + step * (to - from);
      const half = ((to - from) / 2) * scale;
      change[`${name}.range`] = [middle - half, middle + half];
    }
    Plotly.relayout(place, change);
  }
  function whole(id) {
    const { xaxis, yaxis } = figures[id].layout;
    const axes = { xaxis, yaxis };
    const change = {};
    for (const [name, axis] of Object.entries(axes)) {
      if (axis.range) change[`${name}.range`] = axis.range.slice();
      else change[`${name}.autorange`] = true;
    }
    Plotly.relayout(document.getElementById(id), change);
  }
  const actions = {
    "+": (id) => move(id, 0.7, 0, 0),
    "=": (id) => move(id, 0.7, 0, 0),
    "-": (id) => move(id, 1 / 0.7, 0, 0),
    "0": whole,
    ArrowLeft: (id) => move(id, 1, -0.15, 0),
    ArrowRight: (id) => move(id, 1, 0.15, 0),
    ArrowUp: (id) => move(id, 1, 0, id === "coupling" ? -0.15 : 0.15),
    ArrowDown: (id) => move(id, 1, 0, id === "coupling" ? 0.15 : -0.15),
  };
  for (const button of document.querySelectorAll("button[data-zoom]")) {
    button.addEventListener("click", () => actions[button.dataset.zoom](button.dataset.figure));
  }
  for (const id of Object.keys(figures)) {
    document.getElementById(id).addEventListener("keydown", (event) => {
      if (event.target !== event.currentTarget || event.ctrlKey || event.metaKey || event.altKey || !(event.key in actions)) return;
      event.preventDefault();
      actions[event.key](id);
    });
  }
})();
