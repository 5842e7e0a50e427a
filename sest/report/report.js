// Draws the figures of the page. A figure names its colours by CSS variables, so it follows the colour scheme.
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const settings = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };
  const drawn = new Set();

  function coloured(value, style) {
    if (typeof value === "string") {
      const name = /^var\((--[a-z]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((inner) => coloured(inner, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner, style)]));
  }

  function draw(plot) {
    const style = getComputedStyle(root);
    const { data, layout, height } = figures[plot.dataset.figure];
    const shown = coloured(layout, style);
    shown.font.family = getComputedStyle(document.body).fontFamily;
    shown.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom"; // a finger scrolls the page
    plot.style.height = height ? `${height}px` : "";
    drawn.add(plot);
    name(plot);
    Plotly.react(plot, coloured(data, style), shown, settings);
  }

  // What the marks of a plot mean.
  function name(plot) {
    const marks = (figures[plot.dataset.figure].key || []).map(([words, colour, symbol]) => {
      const made = document.createElement("span");
      made.className = symbol;
      made.style.setProperty("--mark", colour);
      made.textContent = words;
      return made;
    });
    plot.parentElement.querySelector(".key").replaceChildren(...marks);
  }

  // The numbers of a table, once it is open.
  function fill(details) {
    if (!details.open) return;
    const { columns, rows } = figures[details.dataset.rows];
    const table = document.createElement("table");
    const numeric = columns.map((_, i) => rows.some((row) => typeof row[i] === "number"));
    const line = (cells, tag, parent) => {
      const row = parent.insertRow();
      cells.forEach((cell, i) => {
        const made = document.createElement(tag);
        made.textContent = cell === null ? "-" : typeof cell === "number" ? Number(cell.toPrecision(4)) : cell;
        if (numeric[i]) made.className = "number";
        row.append(made);
      });
    };
    line(columns, "th", table.createTHead());
    const body = table.createTBody();
    for (const row of rows) line(row, "td", body);
    details.querySelector(".scroll").replaceChildren(table);
  }

  // A figure as a file, on white, with a key of its own and the title of its caption.
  async function save(figure, format) {
    const plot = figure.querySelector(".plot");
    const { data, layout, key, height } = figures[plot.dataset.figure];
    root.classList.add("print");
    const style = getComputedStyle(root);
    const [traces, shown] = [coloured(data, style), coloured(layout, style)];
    root.classList.remove("print");
    const chosen = figure.querySelector("select option:checked, button[aria-pressed=true]");
    const caption = figure.querySelector("figcaption").textContent;
    const title = chosen ? `${caption}: ${chosen.textContent}` : caption;
    shown.font.family = "Arial, Helvetica, sans-serif";
    shown.paper_bgcolor = shown.plot_bgcolor = "white";
    shown.showlegend = Boolean(key);
    const words = title.replace(/&/g, "&amp;").replace(/</g, "&lt;");
    const t = traces.some(({ showscale }) => showscale) ? 40 : 14; // Plotly lifts a title by the height of a scale
    shown.title = { text: words, font: { size: 14 }, x: 0.02, xanchor: "left", y: 1, yanchor: "top", pad: { t } };
    const above = 40 + 22 * Math.ceil((key || []).length / 4); // the title, and four entries of the key a row
    shown.margin = { ...shown.margin, t: shown.margin.t + above };
    const size = { width: 800, height: (height || 360) + above, scale: 2 };
    const link = document.createElement("a");
    link.href = await Plotly.toImage({ data: traces, layout: shown }, { format, ...size });
    link.download = `${title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}.${format}`;
    link.click();
  }

  function choose(figure, key) {
    const plot = figure.querySelector(".plot");
    plot.dataset.figure = key;
    draw(plot);
    const numbers = figure.querySelector("details[data-rows]");
    numbers.dataset.rows = key;
    fill(numbers);
  }

  const plots = [...document.querySelectorAll(".plot")];
  const seen = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        seen.unobserve(target);
        draw(target);
      }
    },
    { rootMargin: "600px" },
  );
  plots.forEach((plot) => seen.observe(plot));

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button && button.dataset.save) save(button.closest("figure"), button.dataset.save);
    if (!button || !button.dataset.figure) return;
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", other === button);
    choose(button.closest("figure"), button.dataset.figure);
  });
  document.addEventListener("change", (event) => {
    if (event.target.matches("figure select")) choose(event.target.closest("figure"), event.target.value);
  });
  for (const details of document.querySelectorAll("details[data-rows]")) {
    details.addEventListener("toggle", () => fill(details));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
  addEventListener("beforeprint", () => {
    root.classList.add("print");
    plots.forEach(draw);
  });
  addEventListener("afterprint", () => {
    root.classList.remove("print");
    plots.forEach(draw);
  });
})();
