"use strict";
// Draws the figures in the colours of the page's scheme, anew when the scheme changes.
(function () {
  const text = document.getElementById("figures").textContent;
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue("--" + name).trim();
    return { ink: read("ink"), muted: read("muted"), shade: read("shade"), grid: read("grid"), line: read("line"), card: read("card") };
  }

  function figures() {
    const { ink, muted, shade } = colours();
    const known = { "$ink": ink, "$muted": muted, "$shade": shade };
    return JSON.parse(text, (_, value) => (typeof value === "string" && Object.hasOwn(known, value) ? known[value] : value));
  }

  function styled(layout) {
    const { ink, grid, line, card } = colours();
    const axis = { automargin: true, ticks: "outside", ticklen: 5, tickcolor: "rgba(0,0,0,0)", gridcolor: grid, zerolinecolor: line, linecolor: line, title: { standoff: 10 } };
    const base = {
      template: {
        layout: { xaxis: axis, yaxis: axis, hoverlabel: { bgcolor: card, bordercolor: line, font: { color: ink }, align: "left", namelength: -1 } },
      },
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: ink },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      autosize: true,
      showlegend: true,
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", xanchor: "left" },
    };
    const out = Object.assign(base, layout);
    out.margin = Object.assign({ l: 8, r: 16, t: 48, b: 48 }, layout.margin);
    return out;
  }

  let all = figures();
  const drawn = new Set();

  function draw(place) {
    const figure = all[place.dataset.figure];
    drawn.add(place);
    Plotly.react(place, figure.data, styled(figure.layout), { responsive: true, displayModeBar: false });
  }

  const places = [...document.querySelectorAll("[data-figure]")].filter((place) => place.dataset.figure in all);
  const waiting = places.slice();

  // One after the other, from the top: the page can be read and scrolled meanwhile.
  function next() {
    const place = waiting.shift();
    if (place === undefined) {
      document.documentElement.dataset.drawn = String(drawn.size);
      return;
    }
    if (!drawn.has(place)) draw(place);
    setTimeout(next, 0);
  }
  next();
  window.addEventListener("beforeprint", () => places.filter((place) => !drawn.has(place)).forEach(draw));
  scheme.addEventListener("change", () => {
    all = figures();
    drawn.forEach(draw);
  });
})();
