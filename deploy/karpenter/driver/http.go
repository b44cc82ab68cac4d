package driver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

const (
	// A driver answers at once: what takes long it does afterwards.
	patience = 30 * time.Second
	// Above the largest list of instances that is taken.
	mostBytes = 32 << 20
)

// HTTP speaks with a driver that serves the contract.
type HTTP struct {
	base   string
	bearer string
	client *http.Client
}

// Dial takes unix:///PATH, https://HOST[:PORT] or, on loopback alone, http://…;
// bearer is a file with the token that the driver asks for, or empty.
func Dial(address, bearer string) (*HTTP, error) {
	where, err := url.Parse(address)
	if err != nil {
		return nil, fmt.Errorf("driver: %w", err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	// The driver is the operator's own: no proxy of the environment is asked.
	transport.Proxy = nil
	base := strings.TrimSuffix(address, "/")
	switch where.Scheme {
	case "unix":
		if where.Host != "" || !strings.HasPrefix(where.Path, "/") {
			return nil, fmt.Errorf("driver: %q must be unix:///PATH", address)
		}
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", where.Path)
		}
		base = "http://driver"
	case "https":
	case "http":
		if ip := net.ParseIP(where.Hostname()); ip == nil || !ip.IsLoopback() {
			return nil, fmt.Errorf("driver: %q would carry bootstrap tokens in the clear: use https or unix", address)
		}
	default:
		return nil, fmt.Errorf("driver: %q must be unix:///PATH or https://HOST[:PORT]", address)
	}
	if bearer != "" {
		if _, err := os.Stat(bearer); err != nil {
			return nil, fmt.Errorf("driver's token: %w", err)
		}
	}
	return &HTTP{base: base, bearer: bearer, client: &http.Client{Transport: transport, Timeout: patience}}, nil
}

func (h *HTTP) Shapes(ctx context.Context, class Class) ([]Shape, error) {
	var answer struct {
		Shapes []Shape `json:"shapes"`
	}
	if err := h.call(ctx, http.MethodPost, "/v1/shapes", class, &answer); err != nil {
		return nil, err
	}
	if len(answer.Shapes) > mostShapes {
		return nil, fmt.Errorf("the driver tells of %d shapes, %d at most are taken", len(answer.Shapes), mostShapes)
	}
	names := map[string]bool{}
	for i := range answer.Shapes {
		shape := &answer.Shapes[i]
		if err := shape.check(); err != nil {
			return nil, fmt.Errorf("the driver tells of a %w", err)
		}
		if names[shape.Name] {
			return nil, fmt.Errorf("the driver tells of shape %s twice", shape.Name)
		}
		names[shape.Name] = true
	}
	return answer.Shapes, nil
}

func (h *HTTP) Create(ctx context.Context, order Order) (*Instance, error) {
	return h.instance(ctx, http.MethodPut, "/v1/instances/"+url.PathEscape(order.Name), order)
}

func (h *HTTP) Get(ctx context.Context, name string) (*Instance, error) {
	return h.instance(ctx, http.MethodGet, "/v1/instances/"+url.PathEscape(name), nil)
}

func (h *HTTP) Find(ctx context.Context, providerID string) (*Instance, error) {
	found, err := h.list(ctx, "?providerId="+url.QueryEscape(providerID))
	if err != nil {
		return nil, err
	}
	for i := range found {
		if found[i].ProviderID == providerID {
			return &found[i], nil
		}
	}
	return nil, fmt.Errorf("%w: %s", ErrNotFound, providerID)
}

func (h *HTTP) List(ctx context.Context) ([]Instance, error) {
	return h.list(ctx, "")
}

func (h *HTTP) Delete(ctx context.Context, name string) error {
	return h.call(ctx, http.MethodDelete, "/v1/instances/"+url.PathEscape(name), nil, nil)
}

func (h *HTTP) list(ctx context.Context, query string) ([]Instance, error) {
	var answer struct {
		Instances []Instance `json:"instances"`
	}
	if err := h.call(ctx, http.MethodGet, "/v1/instances"+query, nil, &answer); err != nil {
		return nil, err
	}
	if len(answer.Instances) > mostInstances {
		return nil, fmt.Errorf("the driver tells of %d instances, %d at most are taken", len(answer.Instances), mostInstances)
	}
	for i := range answer.Instances {
		if err := answer.Instances[i].check(); err != nil {
			return nil, fmt.Errorf("the driver tells of an %w", err)
		}
	}
	return answer.Instances, nil
}

func (h *HTTP) instance(ctx context.Context, method, path string, body any) (*Instance, error) {
	instance := &Instance{}
	if err := h.call(ctx, method, path, body, instance); err != nil {
		return nil, err
	}
	if err := instance.check(); err != nil {
		return nil, fmt.Errorf("the driver tells of an %w", err)
	}
	return instance, nil
}

// refusal is the body of every answer that is no success.
type refusal struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (h *HTTP) call(ctx context.Context, method, path string, body, answer any) error {
	var content io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(ctx, method, h.base+path, content)
	if err != nil {
		return err
	}
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	if h.bearer != "" {
		token, err := os.ReadFile(h.bearer)
		if err != nil {
			return fmt.Errorf("driver's token: %w", err)
		}
		request.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	}
	response, err := h.client.Do(request)
	if err != nil {
		return fmt.Errorf("asking the driver: %w", err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, mostBytes+1))
	if err != nil {
		return fmt.Errorf("reading the driver's answer: %w", err)
	}
	if len(text) > mostBytes {
		return errors.New("the driver's answer is too long")
	}
	if response.StatusCode/100 == 2 {
		if answer == nil {
			return nil
		}
		if err := json.Unmarshal(text, answer); err != nil {
			return fmt.Errorf("the driver's answer is not understood: %w", err)
		}
		return nil
	}
	var why refusal
	if json.Unmarshal(text, &why) != nil || why.Code == "" {
		return fmt.Errorf("the driver answered %s", response.Status)
	}
	kind, known := map[string]error{
		"out_of_capacity": ErrNoCapacity,
		"not_found":       ErrNotFound,
		"invalid":         ErrInvalid,
		"conflict":        ErrConflict,
	}[why.Code]
	if !known {
		return fmt.Errorf("the driver refused (%s): %s", why.Code, why.Message)
	}
	return fmt.Errorf("%w: %s", kind, why.Message)
}
